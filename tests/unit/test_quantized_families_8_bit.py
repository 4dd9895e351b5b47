"""Every format with 8 bits a value in every family of which it can be: chains give transformers' rows of the unpacked weights."""

from itertools import product
from pathlib import Path

import pytest

from tests.packed import SIZES, assert_rows_are_of_the_unpacked_weights

COMPRESSED = ("float-quantized", "float-quantized-tensor", "float-quantized-block", "int-quantized")
FORMATS = (*COMPRESSED, "fp8-static", "fp8-ue8m0", "mxfp8", "modelopt-fp8")


@pytest.mark.parametrize(("family", "fmt"), list(product(SIZES, FORMATS)))
def test_rows(family: str, fmt: str, tmp_path: Path) -> None:
    assert_rows_are_of_the_unpacked_weights(family, fmt, tmp_path)
