"""GPUs in words, limits in words, and what a probe finds on the machine at hand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m2ray import planning
from m2ray.chain.machine import disk_free_bytes, peak_rss_bytes, probe_node, unshared_bytes, visible_devices
from m2ray.errors import ConfigError, M2rayError
from m2ray.planning.hardware import GPU_MODELS, Gpu, find_gpu_model, parse_gpus
from m2ray.sizes import MaxMemory, parse_max_memory

GB = 10**9


def test_gpus_by_name_have_the_drivers_bytes():
    cluster = parse_gpus("8xA100-80GB")
    assert [gpu.index for gpu in cluster.nodes[0].gpus] == list(range(8))
    assert {(gpu.name, gpu.total_bytes, gpu.free_bytes) for gpu in cluster.nodes[0].gpus} == {("A100-80GB", 81920 * 2**20, 81408 * 2**20)}
    assert parse_gpus("H200").nodes[0].gpus[0].total_bytes == 143771 * 2**20


def test_nodes_and_mixed_clusters():
    cluster = parse_gpus("2 nodes of 8xH100-80GB, 4 x L40S")
    assert [(node.name, len(node.gpus), node.gpus[0].name) for node in cluster.nodes] == [
        ("node-0", 8, "H100-80GB"),
        ("node-1", 8, "H100-80GB"),
        ("node-2", 4, "L40S-48GB"),
    ]
    assert cluster.num_gpus == 20


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "4090-24GB"),
        ("RTX4090", "4090-24GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("h200", "H200-141GB"),
        ("A100 80 GiB", "A100-80GB"),
        ("A100", None),  # of 40 GB or of 80?
        ("H100-96GB", None),
        ("H200-80GB", None),
        ("GH200", None),
        ("NVIDIA RTX 6000 Ada Generation", None),
    ],
)
def test_names_as_users_and_drivers_write_them(name, model):
    assert find_gpu_model(name) == model


@pytest.mark.parametrize("known", GPU_MODELS)
def test_every_name_of_the_table_finds_itself(known):
    assert find_gpu_model(known) == known


def test_unknown_and_malformed_gpus_are_all_listed():
    with pytest.raises(ConfigError, match=r"2 problems(.|\n)*'MI300X'(.|\n)*A100-40GB(.|\n)*'8'"):
        parse_gpus("8xMI300X,8")
    for text in ("", "0xH200", "0 nodes of 8xH200", "x8"):
        with pytest.raises(ConfigError):
            parse_gpus(text)


def test_a_slip_of_the_finger_is_refused_at_once():
    for text in ("100000000xH200", "100000 nodes of 100000xH200", "4096xH200,H200"):
        with pytest.raises(ConfigError, match="more than 4,096 GPUs"):
            parse_gpus(text)
    assert parse_gpus("512 nodes of 8xH200").num_gpus == 4096


def gpu(index: int, free_bytes: int = 80 * GB) -> Gpu:
    return Gpu(index, "H100-80GB", 85 * GB, free_bytes)


def test_one_limit_is_for_every_gpu_and_never_above_what_is_free():
    limit = parse_max_memory("40GiB")
    assert limit.usable_bytes("any", 3, 80 * GB) == 40 * 2**30
    assert limit.usable_bytes("any", 3, 5 * GB) == 5 * GB
    assert parse_max_memory(None).usable_bytes("any", 0, 80 * GB) == 80 * GB


def test_a_list_leaves_out_the_gpus_that_it_does_not_name():
    limit = parse_max_memory("0:60GB, 1:60GB,2:40GB")
    assert [limit.usable_bytes("any", index, 80 * GB) for index in range(4)] == [60 * GB, 60 * GB, 40 * GB, 0]


def test_limits_node_by_node():
    limit = parse_max_memory("a=40GB; b=0:60GB,1:50GB; 30GB")
    assert limit.usable_bytes("a", 7, 80 * GB) == 40 * GB
    assert [limit.usable_bytes("b", index, 80 * GB) for index in range(3)] == [60 * GB, 50 * GB, 0]
    assert limit.usable_bytes("c", 0, 80 * GB) == 30 * GB
    assert parse_max_memory("a=40GB").usable_bytes("c", 0, 80 * GB) == 80 * GB


@pytest.mark.parametrize(
    "text", ["", "0:60GB,60GB", "0:60GB,0:50GB", "x:60GB", "=40GB", "a=40GB;a=50GB", "40GB;50GB", "-1:60GB", "0:", "40 bananas"]
)
def test_malformed_limits_are_refused(text):
    with pytest.raises(ConfigError, match="max_memory"):
        parse_max_memory(text)


def test_limits_for_what_is_not_there_are_all_listed():
    has = {"a": 2, "b": 1}
    with pytest.raises(ConfigError, match=r"2 problems(.|\n)*node 'c'(.|\n)*GPU 1 of node 'b'"):
        parse_max_memory("b=0:1GB,1:1GB;c=1GB").require_known(has)
    with pytest.raises(M2rayError, match="GPU 2"):
        parse_max_memory("0:1GB,2:1GB").require_known(has)
    parse_max_memory("0:1GB,1:1GB").require_known(has)
    MaxMemory().require_known(has)


def test_devices_are_visible_by_the_rules_of_cuda_visible_devices():
    devices = [("0", "GPU-aa11"), ("1", "GPU-bb22"), ("2", "GPU-cc33")]
    assert visible_devices(None, devices) == devices
    assert visible_devices("2,0", devices) == [devices[2], devices[0]]
    assert visible_devices("GPU-bb", devices) == [devices[1]]
    assert visible_devices("1,7,0", devices) == [devices[1]]
    assert visible_devices("", devices) == []
    assert visible_devices("-1", devices) == []


def test_a_probe_reads_this_machine(tmp_path):
    node = probe_node(folder=str(tmp_path / "not" / "made" / "yet"))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert node.cpus == len(os.sched_getaffinity(0))
    assert 0 < node.host_free_bytes <= node.host_bytes <= pages
    found = os.statvfs(tmp_path)
    assert node.disk_free_bytes == pytest.approx(found.f_bavail * found.f_frsize, rel=0.05)
    assert node.shm_bytes is None or 0 <= node.shm_free_bytes <= node.shm_bytes
    assert node.versions["python"] == sys.version.split()[0]
    assert {"ray", "torch"} <= node.versions.keys()
    assert probe_node(name="here").name == "here"
    assert probe_node().disk_free_bytes is None


def test_the_disk_of_a_run_folder_is_found_however_it_is_written(tmp_path):
    free_bytes = shutil.disk_usage(tmp_path).free
    for output in (str(tmp_path / "run"), f"file://{tmp_path}/run"):
        assert disk_free_bytes(output) == pytest.approx(free_bytes, rel=0.05)
    assert disk_free_bytes("s3://bucket/run") is None
    assert disk_free_bytes(None) is None


def test_a_folder_in_memory_is_told_from_one_on_a_disk():
    assert probe_node(folder="/dev/shm/not-made-yet").disk_in_memory
    assert not probe_node(folder=str(Path(__file__))).disk_in_memory


def test_planning_imports_without_torch_ray_or_transformers():
    names = [path.stem for path in Path(planning.__file__).parent.glob("*.py") if path.stem != "__init__"]
    assert "plan" in names
    code = "import sys; [__import__('m2ray.planning.' + name) for name in sys.argv[1:]]; print({'torch', 'ray', 'transformers'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "set()"


def test_the_peak_of_a_process_is_its_own():
    held = b"x" * 300 * 2**20
    asked = [sys.executable, "-c", "from m2ray.chain.machine import peak_rss_bytes; print(peak_rss_bytes())"]
    child_bytes = int(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert 5 * 2**20 < child_bytes < len(held) < peak_rss_bytes()


_SHARING = """
import mmap, os
descriptor = os.memfd_create("shared")
os.ftruncate(descriptor, 200 << 20)
shared, own = mmap.mmap(descriptor, 200 << 20), b"x" * (100 << 20)
shared.write(own)
shared.write(own)
input(print("ready", flush=True))
"""


def test_what_another_process_has_to_itself_is_told_without_what_it_shares():
    with subprocess.Popen([sys.executable, "-c", _SHARING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        assert 100 * 2**20 < unshared_bytes(other.pid) < 150 * 2**20
        other.communicate("\n", timeout=20)
    assert unshared_bytes(other.pid) == 0
