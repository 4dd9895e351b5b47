"""Sites: what an option's words come to, for a model that has them, and which stage captures what."""

from typing import get_args

import pytest

from m2ray.batches import Column, LayerSpan, PartSpec
from m2ray.errors import ConfigError, M2rayError
from m2ray.option_text import SiteName, parse_sites
from m2ray.sites import SITES, asked_sites, last_layer, layers_run, parts_of_run, parts_of_span, present_sites, shown_layers
from m2ray.tensor_rows import TensorTable

MIXED = TensorTable(
    6,
    300,
    (),
    num_experts=16,
    experts_per_token=4,
    layers_of={"residual": tuple(range(6)), "router_logits": (2, 3, 4), "router_topk": (2, 3, 4), "mlp": tuple(range(6)), "final_norm": ()},
)
"""A model whose first layers and last are dense, with neither `embedding` nor `residual_mid`."""


def test_the_table_has_the_names_that_an_option_takes() -> None:
    assert tuple(SITES) == get_args(SiteName)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("residual", {"residual": None}),
        ("residual:all, router_topk:all,mlp:20-30", {"residual": "all", "router_topk": "all", "mlp": "20-30"}),
        ("mlp : 0, 7 ,20-61 , embedding", {"mlp": "0, 7 ,20-61", "embedding": None}),
    ],
)
def test_layers_follow_their_site(text: str, expected: dict[str, str | None]) -> None:
    assert parse_sites(text) == expected


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("nowhere, mlp, mlp:3", ["There is no site 'nowhere'", "mlp is named twice"]),
        ("residual,", ["no site ''"]),
        ("3-5", ["no site '3-5'"]),
    ],
)
def test_all_that_is_wrong_with_the_names_is_said_at_once(text: str, wrong: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sites(text)
    assert all(each in str(caught.value) for each in wrong)


def test_a_site_without_layers_takes_the_option_layers() -> None:
    asked = asked_sites("router_topk:all, mlp, residual:5, final_norm", "1-3", 6)
    assert list(asked.items()) == [("residual", (5,)), ("mlp", (1, 2, 3)), ("router_topk", (0, 1, 2, 3, 4, 5)), ("final_norm", ())]
    assert last_layer(asked, 6) == 5
    assert last_layer({"embedding": ()}, 6) == 0


def test_layers_that_a_model_lacks_or_that_no_site_has_are_refused() -> None:
    with pytest.raises(M2rayError) as caught:
        asked_sites("embedding:0, mlp:6, residual:a", "all", 6)
    assert all(each in str(caught.value) for each in ("embedding is one for the whole model", "layer 6 is out of range", "'a' is neither"))


def test_layers_without_a_branch_have_no_part_and_a_site_that_is_nowhere_is_refused_by_name() -> None:
    present = present_sites(asked_sites("residual:1,5, router_topk:all, final_norm", "all", 6), MIXED)
    assert present == {"residual": (1, 5), "router_topk": (2, 3, 4), "final_norm": ()}
    with pytest.raises(M2rayError) as caught:
        present_sites(asked_sites("residual_mid, embedding, router_logits:0-1,5", "all", 6), MIXED)
    told = str(caught.value)
    assert all(
        each in told for each in ("has no residual_mid", "has no embedding", "none of the layers 0-1,5 has router_logits", "layers 2-4")
    )


def test_parts_of_a_mix() -> None:
    sites = {"residual": (1, 5), "router_topk": (2,), "router_logits": (2,), "embedding": (), "final_norm": ()}
    parts = parts_of_run(sites, "bfloat16", 300, 16, 4)
    assert parts == (
        PartSpec.of("residual", 1, "bfloat16", 300),
        PartSpec.of("residual", 5, "bfloat16", 300),
        PartSpec("router_topk", 2, (Column("expert_ids", "int16", 4), Column("expert_weights", "float32", 4))),
        PartSpec.of("router_logits", 2, "float32", 16),
        PartSpec.of("embedding", None, "bfloat16", 300),
        PartSpec.of("final_norm", None, "bfloat16", 300),
    )
    assert [part.row_bytes for part in parts] == [600, 600, 24, 64, 600, 600]
    first, last = (parts_of_span(parts, LayerSpan(*ends), 6) for ends in ((0, 2), (2, 6)))
    assert [str(part) for part in first] == ["residual of layer 1", "embedding"]
    assert [str(part) for part in last] == ["residual of layer 5", "router_topk of layer 2", "router_logits of layer 2", "final_norm"]
    assert (layers_run(parts, 6), layers_run(parts[:1], 6), layers_run((), 6)) == (6, 2, 0)


@pytest.mark.parametrize(("store_dtype", "stored"), [("float8", "float8_e4m3fn"), ("int8", "int8")])
def test_rows_in_8_bits_have_a_scale_for_128_channels(store_dtype: str, stored: str) -> None:
    parts = parts_of_run({"mlp": (0,), "router_logits": (2,)}, store_dtype, 300, 16, 4)
    assert parts == (
        PartSpec("mlp", 0, (Column("activation", stored, 300), Column("scale", "float32", 3))),
        PartSpec.of("router_logits", 2, "float32", 16),
    )
    assert parts[0].row_bytes == 312
    (wide,) = parts_of_run({"mlp": (0,)}, store_dtype, 3072)
    assert wide.row_bytes / 6144 == pytest.approx(0.516, abs=1e-3)


def test_layers_are_shown_as_they_are_asked_for() -> None:
    assert [shown_layers(layers) for layers in ((), (3,), (0, 7, 20, 21, 22), (0, 1))] == ["", "3", "0,7,20-22", "0-1"]
