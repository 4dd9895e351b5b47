"""The method that m2ray is measured against: transformers' own model with `device_map="auto"`, a forward hook on every layer that
copies its output to the host (`.detach().cpu()`), and batches as the tokenizer pads them, in the order of the prompts.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


class Guide:
    """The model with its hooks. `outputs` holds the last batch's rows, layer by layer, [B, T, H] on the host."""

    def __init__(self, folder: Path, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        if config.model_type == "minimax_m2":  # transformers before 5.23 overlooks rotary_dim, and all its rows would be others
            config.rope_parameters["partial_rotary_factor"] = config.rotary_dim / config.head_dim
        if getattr(config, "quantization_config", None):
            # Its FP8 matrix products need kernels from the network; dequantised, the weights have the very values that m2ray's have.
            config.quantization_config["dequantize"] = True
        # Else transformers reads ahead without a bound: all FP8 tensors would be on the GPU beside what they have become.
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.bfloat16, device_map="auto" if device != "cpu" else {"": "cpu"}
        ).eval()
        self.outputs: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(self.model.model.layers):
            layer.register_forward_hook(self._keep(number))

    def encode(self, texts: Sequence[str]) -> Any:
        """Token ids and attention mask [B, T], padded on the side that the tokenizer pads on."""
        return self.tokenizer(list(texts), padding=True, return_tensors="pt")

    def run(self, encoded: Any) -> dict[int, torch.Tensor]:
        """One batch's forward pass, every layer's output in host memory."""
        with torch.no_grad():
            self.model(**encoded.to(self.model.device))
        return self.outputs

    def rows(self, texts: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each prompt of one batch its token ids [T] and its rows [L, T, H], padding left out."""
        encoded = self.encode(texts)
        layers = list(self.run(encoded).values())
        is_real_BT = encoded["attention_mask"].bool().cpu()
        ids_BT = encoded["input_ids"].cpu()
        return [(ids_BT[row][real_T], torch.stack([layer[row][real_T] for layer in layers])) for row, real_T in enumerate(is_real_BT)]

    def restore_router(self, folder: Path) -> None:
        """Put the router back in float32 from the disk, as docs/numerics.md's reference has it: transformers rounds it."""
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for key, file in weight_map.items():
            if not key.endswith((".gate.weight", ".e_score_correction_bias")):
                continue
            mlp = self.model.model.layers[int(key.split(".")[2])].mlp
            with safe_open(folder / file, framework="pt") as tensors:
                value = tensors.get_tensor(key).float().to(mlp.gate.weight.device)
            if key.endswith(".gate.weight"):
                mlp.gate.weight = torch.nn.Parameter(value, requires_grad=False)
            else:
                mlp.e_score_correction_bias = value

    def _keep(self, number: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            self.outputs[number] = (output[0] if isinstance(output, tuple) else output).detach().cpu()

        return hook
