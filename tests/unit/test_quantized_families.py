"""Every quantised format in every family of which it can be: chains of one and of three stages give transformers' rows of the unpacked weights."""

from itertools import product
from pathlib import Path

import pytest
import torch

from scripts.checkpoint_formats.table import FORMATS
from tests.packed import SIZES, make_packed, unpack_all
from tests.reference import chain_rows, load_chain, load_reference, micro_batch_of, reference_rows, same_bits

PAIRS = [pair for pair in product(SIZES, FORMATS) if pair != ("mxfp4",) and (pair[1] != "mxfp4" or pair[0] == "gpt_oss")]
"""gpt-oss's own format is of its experts alone."""


@pytest.mark.parametrize(("family", "fmt"), PAIRS)
def test_rows_are_those_of_the_unpacked_weights(family: str, fmt: str, tmp_path: Path) -> None:
    packed = make_packed(tmp_path / "packed", family, fmt)
    plain = unpack_all(packed, tmp_path / "plain", family, fmt)
    micro_batch = micro_batch_of((9, 5, 1), 96)
    expected = reference_rows(load_reference(plain, torch.bfloat16), micro_batch)
    for bounds in ((0, 3), (0, 1, 2, 3)):
        stages = load_chain(packed, bounds, "bfloat16")
        for layer, (ours, theirs) in enumerate(zip(chain_rows(stages, micro_batch), expected, strict=True)):
            assert same_bits(ours, theirs), layer
        assert all(stage.bytes_read == stage.needed_bytes for stage in stages)
