"""Formats with 8 bits a value, each in two families of six, or in all: chains give transformers' rows of the unpacked weights."""

from pathlib import Path

import pytest

from tests.packed import assert_rows_are_of_the_unpacked_weights, families_with

COMPRESSED = ("float-quantized", "float-quantized-tensor", "float-quantized-block", "int-quantized")
FORMATS = (*COMPRESSED, "fp8-static", "fp8-ue8m0", "mxfp8", "modelopt-fp8")


@pytest.mark.parametrize(("family", "fmt"), families_with(FORMATS))
def test_rows(family: str, fmt: str, tmp_path: Path) -> None:
    assert_rows_are_of_the_unpacked_weights(family, fmt, tmp_path)
