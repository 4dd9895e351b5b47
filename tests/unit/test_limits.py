"""Files of a checkpoint that lie or ask for too much end in one paragraph, in seconds and in bounded memory."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from m2ray.cli import main
from m2ray.errors import CheckpointError
from m2ray.model import limits
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.families import parse_config
from m2ray.model.headers import read_file_header
from m2ray.model.tensor_table import tensor_table
from m2ray.storage import LocalStore
from tests.reference import make_minimax

QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture(autouse=True)
def bounded() -> Any:
    """Each ends within 5 s and 500 MB more than pytest has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (500 << 20), before[1]))
    began = time.process_time()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - began < 5


def write_header(folder: Path, header: Any, data: bytes = b"\0" * 8) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def paragraph(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    text = str(error.value)
    assert len(text) < 5000
    assert all(line.isprintable() for line in text.split("\n"))
    return text


@pytest.mark.parametrize(
    ("header", "words"),
    [
        pytest.param({"a": GOOD | {"dtype": ["F32"]}}, r"'a' is of dtype \['F32'\]", id="dtype-list"),
        pytest.param({"a": GOOD | {"dtype": {"x": 1}}}, "is of dtype", id="dtype-object"),
        pytest.param({"a": GOOD | {"dtype": None}}, "is of dtype None", id="dtype-null"),
        pytest.param({"a": GOOD | {"shape": [True, 2]}}, "no count", id="bool"),
        pytest.param({"a": GOOD | {"shape": [2.0]}}, "no count", id="float"),
        pytest.param({"a": GOOD | {"shape": [1] * 17}}, "no count", id="axes"),
        pytest.param({"a": GOOD | {"shape": [2**63]}}, "no count", id="large"),
        pytest.param({"a": GOOD | {"shape": [10**4000]}}, "no count", id="4,000 digits"),
        pytest.param(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}", "is not JSON", id="5,000 digits"),
        pytest.param(b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply", id="nested"),
        pytest.param({"a": json.loads("[" * 300 + "]" * 300)}, "malformed", id="nested-less"),
        pytest.param({"a": GOOD | {"data_offsets": "08"}}, "no count", id="text"),
        pytest.param({"a": 5}, "malformed", id="number"),
        pytest.param({"a\x1b[31m\n": GOOD | {"dtype": "F7"}}, r"a\\x1b\[31m\\n' is of dtype 'F7'", id="control"),
        pytest.param(b"[" + b"{}," * 2_000_000 + b"{}]", "m2ray reads up to", id="many-values"),
    ],
)
def test_a_header_that_lies(header: Any, words: str, tmp_path: Path) -> None:
    write_header(tmp_path, header)
    with pytest.raises(CheckpointError, match=words) as error:
        read_file_header(LocalStore(tmp_path), "model.safetensors")
    paragraph(error)


def test_a_header_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((90 << 20).to_bytes(8, "little"))
        file.truncate(100 << 20)
    with pytest.raises(CheckpointError, match="claims a header of 94371840 bytes"):
        read_file_header(LocalStore(tmp_path), "model.safetensors")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        pytest.param({"weight_map": {"a": "model\0.safetensors"}}, r"\\x00", id="zero-byte"),
        pytest.param({"weight_map": {"a": "x\x1b[31m.bin"}}, r"\\x1b", id="control"),
        pytest.param({"weight_map": {str(n): f"{n}.safetensors" for n in range(3000)}}, "names 3,000 files", id="files"),
        pytest.param({"weight_map": {str(n): f"../{n}" for n in range(1999)}}, "1,969 lines more", id="unsafe"),
        pytest.param([], "not a JSON object", id="list"),
        pytest.param({"weight_map": json.loads("[" * 300 + "]" * 300)}, "does not map", id="nested"),
    ],
)
def test_an_index_that_lies(index: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words) as error:
        open_checkpoint(str(tmp_path)).check()
    paragraph(error)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"num_hidden_layers": 0}, "0 decoder layers", id="none"),
        pytest.param({"num_hidden_layers": -3}, "-3", id="negative"),
        pytest.param({"num_hidden_layers": 100_000}, "num_hidden_layers = 100000, more than 1000", id="100,000"),
        pytest.param({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000", id="10^12"),
        pytest.param({"num_hidden_layers": 10**4000}, r"num_hidden_layers = 10+\.\.\.0+, more than", id="4,000 digits"),
        pytest.param({"num_experts": 10**9}, "num_experts = 1000000000, more than 32767", id="experts"),
        pytest.param({"num_hidden_layers": 900, "num_experts": 900}, "900 layers of 900 experts", id="layers-of-experts"),
        pytest.param({"num_labels": 10**9}, "num_labels", id="labels"),
        pytest.param({"num_attention_heads": 10**9}, "num_attention_heads", id="heads"),
        pytest.param({"text_config": {"num_hidden_layers": 10**9}}, r"text_config\.num_hidden_layers", id="tower"),
        pytest.param({"hidden_size": 2**80}, "hidden_size = 1208925819614629174706176", id="wide"),
        pytest.param({"x": json.loads("[" * 100 + "]" * 100)}, "nested more than 64 deep", id="nested"),
        pytest.param({"model_type": ["x\x1b"]}, r"\['x\\x1b'\]", id="type"),
    ],
)
def test_a_configuration_that_asks_for_too_much(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as error:
        parse_config(json.dumps(QWEN3 | fields).encode())
    paragraph(error)


@pytest.mark.parametrize("text", [b'{"model_type": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"hidden_size": ' + b"9" * 5000 + b"}"])
def test_a_configuration_that_python_does_not_parse(text: bytes) -> None:
    with pytest.raises(CheckpointError) as error:
        parse_config(text)
    paragraph(error)


def test_a_configuration_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(CheckpointError, match="4,294,967,296 bytes"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("fields", [{"num_attention_heads": 0}, {"hidden_size": 0}, {"head_dim": 0}, {"num_attention_heads": 5}])
def test_sizes_that_no_model_is_built_of_are_no_traceback(fields: dict[str, Any], tmp_path: Path) -> None:
    model = make_minimax(tmp_path / "model", "fp8")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(CheckpointError) as error:
        tensor_table(open_checkpoint(str(model)))
    paragraph(error)


def test_the_real_limits_hold_the_largest_models() -> None:
    """Kimi-K2's and MiniMax-M2's counts, and a header of as many tensors."""
    limits.require_sizes(
        {"num_hidden_layers": 61, "n_routed_experts": 384, "num_attention_heads": 64, "max_position_embeddings": 10_485_760}
    )
    limits.require_sizes({"num_hidden_layers": 62, "num_local_experts": 256, "vocab_size": 200_064})
    header = {f"model.layers.0.mlp.experts.{number}.gate_proj.weight_scale_inv": GOOD for number in range(207_000)}
    text = json.dumps(header).encode()
    assert len(text) < limits.MAX_JSON_BYTES
    assert limits.parse_json(text, "It") == header


def test_plan_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3 | {"num_hidden_layers": 10**6}))
    ended = CliRunner().invoke(main, ["plan", "--model", str(path), "--gpus", "8xH100-80GB"])
    assert ended.exit_code == 1
    assert "num_hidden_layers = 1000000" in ended.stderr
