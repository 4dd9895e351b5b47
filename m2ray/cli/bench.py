"""`m2ray bench`: what this machine does a second, measured and kept in a file for `m2ray plan --profile`."""

import os
import time
from pathlib import Path
from typing import Any

import click

from m2ray.cli import Command
from m2ray.planning.profile import LayerTime, Profile
from m2ray.storage import no_empty_folders

_DEFAULT_TOKENS = {"cuda:0": 16_384, "cpu": 512}
_LONGEST = 2048


@click.command(cls=Command)
@click.argument("model")
@click.option("--output", help="Run folder, on a disk or in a bucket; adds how fast it can be written.")
@click.option("--profile", "profile_path", default="m2ray-profile.json", show_default=True, type=click.Path(path_type=Path))
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Padded tokens in a micro-batch; default: 16384, on a CPU 512.")
@click.option("--compute-dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option("--store-dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option("--compile/--no-compile", "compiled", default=None, help="Whether to time the layer compiled too; default: on a GPU.")
def command(
    model: str,
    output: str | None,
    profile_path: Path,
    batch_tokens: int | None,
    compute_dtype: str,
    store_dtype: str,
    compiled: bool | None,
) -> None:
    """Measure one layer's time, the copy to the host, the encoder, the store and the model's folder.

    MODEL is a checkpoint's folder or a config.json: the layer has the model's real dimensions and random weights. Takes under two
    minutes and writes a profile, from which `m2ray plan --profile FILE` predicts tokens a second.
    """
    began = time.monotonic()
    say = click.echo
    with no_empty_folders(output):
        profile = measure(model, output, batch_tokens, compute_dtype, store_dtype, compiled, say)
    fields = {**vars(profile), "elapsed_s": round(time.monotonic() - began, 1)}
    profile_path.write_text(Profile(**fields).to_json(), encoding="utf-8")
    say(f"{profile_path} written after {fields['elapsed_s']:.0f} s")


def measure(
    model: str, output: str | None, batch_tokens: int | None, compute_dtype: str, store_dtype: str, compiled: bool | None, say: Any
) -> Profile:
    """Measure everything, and tell each figure as it comes.

    Raises:
        M2rayError: the model cannot be read or built, the store cannot be written, or the GPU's memory is too small.
    """
    import torch

    from m2ray.bench.measuring import encode_bytes_per_s, store_bytes_per_s
    from m2ray.bench.trial import TrialLayer, copy_bytes_per_s
    from m2ray.chain.machine import probe_node
    from m2ray.cli.plan_inputs import read_model
    from m2ray.doctor.node_facts import look_at_model
    from m2ray.hub import folder_of
    from m2ray.model.families import default_max_length
    from m2ray.model.row_crcs import can_make_crcs
    from m2ray.planning.passes import active_elements
    from m2ray.storage import open_store

    model = folder_of(model)
    store = None if output is None else open_store(output)
    if store is not None:
        store.probe()
    facts = read_model(model, "auto", compute_dtype)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    node = probe_node()
    layer = TrialLayer(facts.whole_config, getattr(torch, compute_dtype), device)
    rows = [row for row in facts.table.rows if row.layer == layer.number]
    active = active_elements(rows, facts.shape)
    gpu = torch.cuda.get_device_name(0) if device != "cpu" else None
    say(f"{gpu or 'CPU'}, layer {layer.number} of a {facts.whole_config.model_type} in {compute_dtype}, random weights")
    times: list[LayerTime] = []
    shapes = shapes_of(batch_tokens or _DEFAULT_TOKENS[device], default_max_length(facts.config))
    for is_compiled in (False, True) if (device != "cpu" if compiled is None else compiled) else (False,):
        if is_compiled:
            layer.compile()
        for (sequences, length), layer_ms in zip(shapes, layer.times_ms(shapes), strict=True):
            times.append(LayerTime(sequences, length, is_compiled, layer_ms))
            words = "compiled" if is_compiled else "as it is"
            say(f"  {sequences} x {length} tokens, {words}: {layer_ms:.2f} ms, {times[-1].tokens_per_s:,.0f} tokens/s")
    del layer
    copied = copy_bytes_per_s(device) if device != "cpu" else None
    encoded = encode_bytes_per_s(facts.table.hidden_size, store_dtype)
    has_crcs = can_make_crcs(torch.empty((0, facts.table.hidden_size), dtype=getattr(torch, store_dtype), device=device))
    encoded_given_crcs = encode_bytes_per_s(facts.table.hidden_size, store_dtype, with_crcs=True) if has_crcs else None
    cpus = node.cpus or os.cpu_count() or 1
    threads = max(1, cpus // 2) if gpu else 1  # of the stages of all GPUs together, which share the store
    stored = None if store is None else store_bytes_per_s(store, facts.table.hidden_size, store_dtype, threads, with_crcs=has_crcs)
    read = None if model.endswith(".json") else look_at_model(model)[1]
    named = {
        "GPU to host": copied,
        "encoder, a thread": encoded,
        "encoder, a thread, CRCs by the GPU": encoded_given_crcs,
        f"writing to {output}": stored,
        f"reading {model}": read,
    }
    for name, rate in named.items():
        if rate is not None:
            say(f"  {name}: {rate / 1e9:.2f} GB/s")
    return Profile(
        gpu=gpu,
        gpus=len(node.gpus) if gpu else 0,
        cpus=cpus,
        versions=dict(node.versions),
        model_type=facts.whole_config.model_type,
        compute_dtype=compute_dtype,
        active_elements=active,
        layer=tuple(times),
        copy_bytes_per_s=copied,
        encode_bytes_per_s=encoded,
        encode_given_crcs_bytes_per_s=encoded_given_crcs,
        store=None if store is None else store.url,
        store_bytes_per_s=stored,
        read_bytes_per_s=read,
    )


def shapes_of(batch_tokens: int, longest: int) -> list[tuple[int, int]]:
    """Two micro-batches of `batch_tokens` tokens: few long sequences, and four times as many shorter ones."""
    length = min(_LONGEST, longest, batch_tokens)
    return list(dict.fromkeys(((batch_tokens // length, length), (batch_tokens // max(1, length // 4), max(1, length // 4)))))
