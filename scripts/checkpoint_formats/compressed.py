"""What config.json says of a model that compressed-tensors packed."""

from scripts.checkpoint_formats.format import Config

IGNORED = ["lm_head", "re:.*\\.gate$", "re:.*\\.router$"]


def compressed(layout: str, weights: Config) -> Config:
    """quantization_config of compressed-tensors with one group of all linear layers."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None, "format": layout}
    said = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "kv_cache_scheme": None}
    return said | {"format": layout, "ignore": IGNORED, "config_groups": {"group_0": group}}
