"""Every layer's rows by fpwap, layer by layer over all prompts: MODEL PROMPTS OUT. The rows lie in its own files; read them as `result.activations`."""

import json

import torch
from fpwap import Callback, Emit, Sweep
from fpwap.storage.memmap import MemmapBackend
from prompts import arguments, save
from transformers import AutoModelForCausalLM, AutoTokenizer


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
        return Emit(acts[real_BT].to(torch.bfloat16), dtype=torch.bfloat16, sample_lengths=lengths_B)


def main() -> None:
    options = arguments()
    dtype = getattr(torch, options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [json.loads(line)["text"] for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    token_ids = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    longest = max(map(len, token_ids))
    pad = torch.nn.functional.pad
    dataset = [
        {"input_ids": pad(ids, (0, longest - len(ids))), "attention_mask": pad(torch.ones_like(ids), (0, longest - len(ids)))}
        for ids in token_ids
    ]
    sweep = Sweep(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype),
        dataset=dataset,
        seq_len=longest,
        callbacks=[Rows(torch.tensor([len(ids) for ids in token_ids]))],
        storage=MemmapBackend(options.out / "rows"),
        transport_dtype=dtype,
        execution_device="cpu",
        apply_final_norm=False,
        padding="bucketed",
        progress=False,
    )
    result = sweep.run()
    if options.check:
        found = [result.activations(layer, "residual_post") for layer in range(sweep.model.config.num_hidden_layers)]
        for number, ids in enumerate(token_ids):
            rows = [of_layer[number][None] for of_layer in found]
            save(options, [number], rows, ids[None], torch.ones_like(ids)[None])


if __name__ == "__main__":
    main()
