"""The values that travel, and the errors that cross processes."""

import pickle

import numpy as np
import pytest

from m2ray import errors
from m2ray.batches import LayerSpan, MicroBatch
from m2ray.selection import Selection
from m2ray.tensor_rows import TensorRow, TensorTable


def test_token_rows_leave_padding_out() -> None:
    token_ids_BT = np.array([[5, 6, 7], [8, 0, 0]], np.int32)
    micro_batch = MicroBatch(0, 0, True, np.array([3, 9]), np.array([3, 1], np.int32), token_ids_BT)
    rows = Selection().token_rows(micro_batch)
    assert rows["sequence_id"].tolist() == [3, 3, 3, 9]
    assert rows["position"].tolist() == [0, 1, 2, 0]
    assert rows["token_id"].tolist() == [5, 6, 7, 8]
    assert (micro_batch.num_tokens, micro_batch.padded_tokens) == (4, 6)


def test_a_real_token_with_the_padding_id_is_kept() -> None:
    micro_batch = MicroBatch(0, 0, True, np.array([1]), np.array([2], np.int32), np.array([[0, 0]], np.int32))
    assert Selection().token_rows(micro_batch)["token_id"].tolist() == [0, 0]


def test_table_counts_fp32_tensors_apart() -> None:
    rows = (
        TensorRow("embed", "embedding", None, (10, 4), None, 80, ("embed",)),
        TensorRow("l0.w", "layer", 0, (4, 4), None, 16, ("l0.w",)),
        TensorRow("l1.gate", "layer", 1, (2, 4), 4, 32, ("l1.gate",)),
        TensorRow("head", "head", None, (10, 4), None, 80, ("head",)),
    )
    table = TensorTable(2, 4, rows)
    assert table.layer_bytes(2) == (32, 32)
    assert table.role_bytes("embedding", 4) == 160
    assert table.disk_bytes == 208


@pytest.mark.parametrize("bounds", [(-1, 2), (2, 2), (3, 1)])
def test_spans_hold_at_least_one_layer(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="span"):
        LayerSpan(*bounds)


@pytest.mark.parametrize("kind", [errors.M2rayError, *errors.M2rayError.__subclasses__()])
def test_errors_survive_pickling(kind: type[errors.M2rayError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("what 5.", "do that.")))
    assert type(copy) is kind
    assert (copy.what, copy.remedy, str(copy)) == ("what 5.", "do that.", "what 5. do that.")


def test_several_problems_become_one_error() -> None:
    errors.raise_all([])
    with pytest.raises(errors.StoreError, match="^one$"):
        errors.raise_all([errors.StoreError("one")])
    with pytest.raises(errors.M2rayError, match=r"2 problems(.|\n)*1\. one(.|\n)*2\. two"):
        errors.raise_all([errors.StoreError("one"), errors.ConfigError("two")])
    with pytest.raises(errors.MissingPackageError, match=r"^This needs it\.$"):
        errors.raise_all([errors.MissingPackageError("This needs it."), errors.MissingPackageError("This needs it.")])
