"""Every format with 4 bits a value in every family of which it can be: chains give transformers' rows of the unpacked weights."""

from itertools import product
from pathlib import Path

import pytest

from tests.packed import SIZES, assert_rows_are_of_the_unpacked_weights

COMPRESSED = ("mxfp4-pack-quantized", "nvfp4-pack-quantized", "pack-quantized", "pack-quantized-asymmetric")
FORMATS = (*COMPRESSED, "deepseek-v4", "nvfp4", "nvfp4-hf-quant", "awq", "gptq")


@pytest.mark.parametrize(("family", "fmt"), [*product(SIZES, FORMATS), ("gpt_oss", "mxfp4")])
def test_rows(family: str, fmt: str, tmp_path: Path) -> None:
    assert_rows_are_of_the_unpacked_weights(family, fmt, tmp_path)
