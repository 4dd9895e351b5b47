"""What cluster/, ray_cluster.yaml and jobs/configs/ say, checked without Ray: it parses, it fits together, the token is on."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from m2ray.config import ExtractConfig
from m2ray.sizes import parse_bytes

REPOSITORY = Path(__file__).parents[2]
RAY_UP = REPOSITORY / "ray_cluster.yaml"
RAYJOB = REPOSITORY / "cluster/kuberay/rayjob.yaml"
VOLUMES = REPOSITORY / "cluster/kuberay/volumes.yaml"
SBATCH = REPOSITORY / "cluster/slurm/extract.sbatch"
DOCKERFILE = REPOSITORY / "cluster/docker/Dockerfile"
RUNTIME_ENV = REPOSITORY / "cluster/runtime_env.yaml"
RAYJOB_SCHEMA = REPOSITORY / "tests/data/kuberay/rayjob_schema.json"
CONFIG = REPOSITORY / "jobs/configs/minimax-m2.toml"
SHIPPED = sorted({RAY_UP, *(path for path in (REPOSITORY / "cluster").rglob("*") if path.is_file())})
NUM_GPUS = 16


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def ray_start_commands() -> dict[str, str]:
    cluster = documents(RAY_UP)[0]
    return {role: cluster[f"{role}_start_ray_commands"][-1] for role in ("head", "worker")}


def flags(command: str) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in shlex.split(command) if word.startswith("--") and "=" in word)


def pods() -> dict[str, tuple[dict, dict]]:
    """By name: the group of rayjob.yaml and its pod's spec."""
    cluster = documents(RAYJOB)[0]["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}
    return {name: (group, group["template"]["spec"]) for name, group in groups.items()}


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.suffix == ".yaml"], ids=name_of)
def test_yaml_holds_documents(path: Path) -> None:
    assert all(isinstance(document, dict) and document for document in documents(path))


def test_files_that_start_ray_are_those_whose_token_is_checked() -> None:
    starts_ray = re.compile(r"\bray (start|symmetric-run)\b|rayClusterSpec|kind: Ray")
    found = {path for path in SHIPPED if path.suffix != ".md" and starts_ray.search(path.read_text())}
    assert found == {RAY_UP, RAYJOB, SBATCH}


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_turns_the_token_off(path: Path) -> None:
    assert not re.search(r"AUTH_MODE[\s=:\"']*(value: *)?[\"']?disabled|mode: *disabled", path.read_text())


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_up_starts_ray_with_the_token_that_it_hands_out(role: str) -> None:
    exports, start = ray_start_commands()[role].split("ray start")
    assert "RAY_AUTH_MODE=token" in exports
    token_path = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+?);?\s", exports)[1].replace("$HOME", "/home/ubuntu")
    assert documents(RAY_UP)[0]["file_mounts"][token_path] == "~/.ray/auth_token"
    assert start.strip()


def test_kuberay_knows_every_field_of_the_job() -> None:
    """A new field, or one misspelt: `scripts/kuberay_schema.py` asks KubeRay's own schema and writes this part of it again."""
    validator = Draft7Validator(json.loads(RAYJOB_SCHEMA.read_text()))
    assert [problem.message for problem in validator.iter_errors(documents(RAYJOB)[0])] == []


@pytest.mark.parametrize(
    ("written", "misspelt", "reason"),
    [
        ("backoffLimit: 3", "backofLimit: 3", "'backofLimit' was unexpected"),
        ("authOptions:", "authOption:", "'authOption' was unexpected"),
        ("subPath: models", "subpath: models", "'subpath' was unexpected"),
        ('num-gpus: "8"', "num-gpus: 8", "8 is not of type 'string'"),
        ("groupName: gpu-8", "name: gpu-8", "'groupName' is a required property"),
    ],
)
def test_a_field_that_a_cluster_would_drop_is_noticed(written: str, misspelt: str, reason: str) -> None:
    text = RAYJOB.read_text()
    assert written in text
    validator = Draft7Validator(json.loads(RAYJOB_SCHEMA.read_text()))
    problems = [problem.message for problem in validator.iter_errors(yaml.safe_load(text.replace(written, misspelt)))]
    assert any(reason in problem for problem in problems)


def test_kuberay_makes_a_token() -> None:
    assert documents(RAYJOB)[0]["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_slurm_makes_a_token_that_only_its_owner_reads_and_removes_it() -> None:
    before, _ = SBATCH.read_text().split("srun --kill-on-bad-exit")
    assert "export RAY_AUTH_MODE=token\n" in before
    assert re.search(r'umask 077 .*>"\$RAY_AUTH_TOKEN_PATH"', before)
    assert re.search(r"trap 'rm -f \"\$RAY_AUTH_TOKEN_PATH\"", before)


def test_the_image_asks_for_a_token() -> None:
    assert re.search(r"^ENV RAY_AUTH_MODE=token$", DOCKERFILE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", [*SHIPPED, CONFIG], ids=name_of)
def test_named_files_exist(path: Path) -> None:
    named = re.findall(r"(?<![\w./-])(?:cluster|docs|jobs|m2ray|scripts|tests)/[\w./-]*\w\.(?:md|py|sbatch|toml|yaml)\b", path.read_text())
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_every_way_runs_the_same_command() -> None:
    command = "python jobs/extract.py"
    assert documents(RAYJOB)[0]["spec"]["entrypoint"] == f"{command} {name_of(CONFIG)}"
    assert f"'{command} " in SBATCH.read_text()
    assert f'config="${{1:-{name_of(CONFIG)}}}"' in SBATCH.read_text()
    assert f"{command} {name_of(CONFIG)}" in RUNTIME_ENV.read_text()


def test_ray_up_sends_what_an_installation_needs() -> None:
    sent = {remote: REPOSITORY / local for remote, local in documents(RAY_UP)[0]["file_mounts"].items() if "auth_token" not in remote}
    assert [local for local in sent.values() if not local.exists()] == []
    assert {local.name for local in sent.values()} == {"LICENSE", "README.md", "constraints.txt", "m2ray", "pyproject.toml"}
    assert all(remote == f"/home/ubuntu/m2ray/{local.name}" for remote, local in sent.items())


def test_the_image_is_built_from_files_that_exist_and_are_not_ignored() -> None:
    copied = {word for line in re.findall(r"^COPY (.+)$", DOCKERFILE.read_text(), re.MULTILINE) for word in line.split()[:-1]}
    admitted = {line[1:] for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == admitted
    assert all((REPOSITORY / name).exists() for name in copied)


def test_sbatch_is_valid_bash() -> None:
    checked = subprocess.run(["bash", "-n", SBATCH], capture_output=True, text=True, timeout=30, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_configuration_is_valid_and_fits_each_cluster() -> None:
    config = ExtractConfig.from_sources(CONFIG, {})
    assert config.stages == NUM_GPUS

    gpu_nodes = documents(RAY_UP)[0]["available_node_types"]["gpu-8"]
    assert gpu_nodes["min_workers"] * 8 == NUM_GPUS
    group, spec = pods()["gpu-8"]
    assert group["minReplicas"] * int(spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) == NUM_GPUS
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SBATCH.read_text(), re.MULTILINE))
    assert int(settings["nodes"]) * int(settings["gpus-per-node"]) == NUM_GPUS
    assert settings["ntasks-per-node"] == "1"  # symmetric-run starts one Ray a task


def test_the_configurations_folders_are_mounted() -> None:
    config = tomllib.loads(CONFIG.read_text())
    for _, spec in pods().values():
        mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
        covering = {
            key: next(mount for place, mount in mounts.items() if Path(config[key]).is_relative_to(place))
            for key in ("model", "prompts", "output")
        }
        assert covering["model"]["readOnly"]
        assert covering["prompts"]["readOnly"]
        assert not covering["output"].get("readOnly")
    mount = next(command for command in documents(RAY_UP)[0]["setup_commands"] if "mount -t" in command)
    assert all(config[key].startswith("/mnt/m2ray/") for key in ("model", "prompts", "output"))
    assert mount.split()[-1] == "/mnt/m2ray)"


def test_pods_mount_volumes_that_exist() -> None:
    claims = {document["metadata"]["name"] for document in documents(VOLUMES)}
    for _, spec in pods().values():
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == volumes.keys()
        assert {volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume} == claims


def test_shared_memory_holds_the_object_store_and_what_is_in_flight() -> None:
    in_flight_bytes = parse_bytes(ExtractConfig.from_sources(CONFIG, {}).in_flight, "in_flight")
    for group, spec in pods().values():
        shm = next(volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm")
        assert shm["medium"] == "Memory"
        object_store_bytes = int(group["rayStartParams"]["object-store-memory"])
        limits = spec["containers"][0]["resources"]["limits"]
        assert object_store_bytes < parse_bytes(f"{shm['sizeLimit']}B", "shm") < parse_bytes(f"{limits['memory']}B", "memory")
    worker, _ = pods()["gpu-8"]
    assert int(worker["rayStartParams"]["object-store-memory"]) > in_flight_bytes
    assert int(flags(ray_start_commands()["worker"])["object-store-memory"]) > in_flight_bytes
    assert int(re.search(r"OBJECT_STORE_BYTES:-(\d+)", SBATCH.read_text())[1]) > in_flight_bytes


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ports_do_not_collide(role: str) -> None:
    given = {name: int(value) for name, value in flags(ray_start_commands()[role]).items() if name == "port" or name.endswith("-port")}
    lowest, highest = given.pop("min-worker-port"), given.pop("max-worker-port")
    assert len(set(given.values())) == len(given) >= 6
    assert [name for name, port in given.items() if lowest <= port <= highest] == []


def test_stopped_jobs_get_time_to_finish() -> None:
    default_s = 3
    for command in ray_start_commands().values():
        assert int(re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", command)[1]) > default_s
    for _, spec in pods().values():
        stop_s = int(next(pair["value"] for pair in spec["containers"][0]["env"] if pair["name"] == "RAY_JOB_STOP_WAIT_TIME_S"))
        assert default_s < stop_s < spec["terminationGracePeriodSeconds"]


def test_versions_agree() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert documents(RAYJOB)[0]["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    assert {spec["containers"][0]["image"] for _, spec in pods().values()} == {f"m2ray:{version}"}
    assert f"--tag m2ray:{version} " in DOCKERFILE.read_text()
