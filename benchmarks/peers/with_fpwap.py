"""Every layer's rows by fpwap, layer by layer over all prompts: MODEL PROMPTS OUT. The rows lie in its own files; read them as `result.activations`.

With `--stream` it brings the layers from the checkpoint, and says in OUT/measured.json what its own clock measured.
"""

import json

import torch
from fpwap import Callback, Emit, Sweep
from fpwap.callbacks.common import RawActivations
from fpwap.storage.memmap import MemmapBackend
from prompts import arguments, save
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


class Rows(Callback):
    """Each prompt's rows without their padding."""

    phase = "read"
    target_layers = "all"
    target_hooks = ("residual_post",)

    def __init__(self, lengths: torch.Tensor) -> None:
        self._lengths = lengths

    def on_batch(self, layer_idx, hook, acts, sample_ids):  # noqa: ANN001, ANN201 - as fpwap calls it
        lengths_B = self._lengths[sample_ids.cpu()]
        real_BT = torch.arange(acts.shape[1]) < lengths_B[:, None]
        return Emit(acts[real_BT.to(acts.device)].to(torch.bfloat16), dtype=torch.bfloat16, sample_lengths=lengths_B)


def main() -> None:
    options = arguments(stream="the device to which layers are brought", cut="tokens of a prompt at most", check="how many prompts")
    dtype = getattr(torch, options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [json.loads(line)["text"] for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    cut = {"truncation": True, "max_length": int(options.cut)} if options.cut else {}
    token_ids = [torch.tensor(ids) for ids in tokenizer(texts, **cut)["input_ids"]]
    longest = max(map(len, token_ids))
    are_equal = longest == min(map(len, token_ids))
    pad = torch.nn.functional.pad
    dataset = [
        {"input_ids": ids}
        if are_equal
        else {"input_ids": pad(ids, (0, longest - len(ids))), "attention_mask": pad(torch.ones_like(ids), (0, longest - len(ids)))}
        for ids in token_ids
    ]
    sweep = Sweep(
        model=str(options.model) if options.stream else AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype),
        dataset=dataset,
        seq_len=longest,
        callbacks=[RawActivations(last_token_only=False) if are_equal else Rows(torch.tensor([len(ids) for ids in token_ids]))],
        storage=MemmapBackend(options.out / "rows"),
        transport_dtype=dtype,
        microbatch_size="auto" if options.stream else None,
        execution_device=options.stream or "cpu",
        apply_final_norm=False,
        padding="fixed" if are_equal else "bucketed",
        progress=False,
    )
    result = sweep.run()
    if options.stream:
        profile, layers = result.profile, result.profile.per_layer.values()
        measured = {
            "tokens": sum(map(len, token_ids)),
            "run_s": profile.total_wall_s,
            "setup_s": profile.preloop_s,
            "load_s": sum(each.load_s for each in layers),
            "callback_s": sum(each.callback_s for each in layers) + profile.emit_drain_s,
            "teardown_s": profile.teardown_s,
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        }
        (options.out / "measured.json").write_text(json.dumps(measured))
        print(profile.summary(), flush=True)
    if options.check:
        num_layers = AutoConfig.from_pretrained(options.model).num_hidden_layers
        found = [result.activations(layer, "residual_post") for layer in range(num_layers)]
        for number, ids in enumerate(token_ids[: int(options.check)]):
            rows = [of_layer[number][None] for of_layer in found]
            save(options, [number], rows, ids[None], torch.ones_like(ids)[None])


if __name__ == "__main__":
    main()
