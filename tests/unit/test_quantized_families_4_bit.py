"""Formats with 4 bits a value, each in two families of six, or in all: chains give transformers' rows of the unpacked weights."""

from pathlib import Path

import pytest

from m2ray.model import pieces
from tests.packed import assert_rows_are_of_the_unpacked_weights, families_with

COMPRESSED = ("mxfp4-pack-quantized", "nvfp4-pack-quantized", "pack-quantized", "pack-quantized-asymmetric")
FORMATS = (*COMPRESSED, "deepseek-v4", "nvfp4", "nvfp4-hf-quant", "awq", "gptq", "gptq-v2")


@pytest.mark.parametrize(("family", "fmt"), [*families_with(FORMATS), ("gpt_oss", "mxfp4")])
def test_rows(family: str, fmt: str, tmp_path: Path) -> None:
    assert_rows_are_of_the_unpacked_weights(family, fmt, tmp_path)


@pytest.mark.parametrize("piece_bytes", [300, 1000])
@pytest.mark.parametrize(
    ("family", "fmt"), [("gpt_oss", "mxfp4"), *(("llama", fmt) for fmt in ("nvfp4", "pack-quantized-asymmetric", "awq", "gptq", "gptq-v2"))]
)
def test_rows_where_tensors_are_cut_into_pieces(
    family: str, fmt: str, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    assert_rows_are_of_the_unpacked_weights(
        family, fmt, tmp_path, most_read=2 if fmt == "gptq-v2" else 1.1
    )  # its g_idx goes with each piece
