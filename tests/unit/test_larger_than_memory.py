"""A checkpoint three times as large as what a limit leaves for weights, on a machine without GPUs: in bounded memory, and the same rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import m2ray
from tests.ray.test_extract import micro_batches
from tests.reference import DATA, load_reference, make_minimax, reference_rows, same_bits

NUM_LAYERS, HIDDEN = 40, 512

SCRIPT = """
import sys, psutil, torch, transformers, pyarrow, ray, m2ray
before = psutil.Process().memory_info().rss
run = m2ray.extract(model=sys.argv[1], prompts=sys.argv[2], output=sys.argv[3], offload="disk", max_memory="850MB", layers="0,20,39",
                    threads_per_stage=1, shard_tokens=64, compute_dtype="float32", store_dtype="float32")
(most_kib,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(most_kib) * 1024, int(most_kib) * 1024 - before)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's layers of 16.8 MB each in float32, all of the same values in other orders."""
    folder = make_minimax(tmp_path_factory.mktemp("tokenizer") / "model", "bf16")
    for path in folder.glob("model*"):
        path.unlink()
    config = json.loads((DATA / "llama" / "config.json").read_text())
    inner, vocabulary = 4 * HIDDEN, json.loads((folder / "config.json").read_text())["vocab_size"]
    config |= {"num_hidden_layers": NUM_LAYERS, "hidden_size": HIDDEN, "intermediate_size": inner, "vocab_size": vocabulary}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    drawn = torch.randn(inner, HIDDEN, generator=torch.Generator().manual_seed(0)) * 0.02
    norm = torch.ones(HIDDEN)
    tensors = {
        "model.embed_tokens.weight": drawn[:vocabulary].clone(),
        "lm_head.weight": drawn[:vocabulary].clone(),
        "model.norm.weight": norm,
    }
    for layer in range(NUM_LAYERS):
        shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {"mlp.gate_proj": (inner, HIDDEN), "mlp.up_proj": (inner, HIDDEN), "mlp.down_proj": (HIDDEN, inner)}
        for place, (name, shape) in enumerate(shapes.items()):
            values = drawn.flatten().roll(1000 * layer + place)[: shape[0] * shape[1]]
            tensors[f"model.layers.{layer}.{name}.weight"] = values.reshape(shape).contiguous()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = norm.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_memory_stays_bounded_and_rows_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    prompts, run = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("".join("one two three " * (1 + number % 3) + "\n" for number in range(12)))
    words = [sys.executable, "-c", SCRIPT, str(model), str(prompts), str(run)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env={"PATH": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    (peak_bytes, grown_bytes), checkpoint_bytes = map(int, done.stdout.split()[-2:]), (model / "model.safetensors").stat().st_size
    planned_bytes = json.loads((run / "report.json").read_text())["stages"][0]["planned_host_bytes"]
    assert peak_bytes <= planned_bytes <= 850_000_000
    assert grown_bytes < 0.6 * checkpoint_bytes, (grown_bytes, "not all layers were in memory at one time")
    reader, reference = m2ray.open_run(run), load_reference(model, torch.float32)
    for micro_batch in micro_batches(run):
        expected = reference_rows(reference, micro_batch)
        starts = [0, *micro_batch.token_counts.cumsum().tolist()]
        for place, sequence_id in enumerate(micro_batch.sequence_ids.tolist()):
            for layer in (0, 20, 39):
                assert same_bits(reader.layer(layer).sequence(sequence_id), expected[layer][starts[place] : starts[place + 1]])
