"""ExtractConfig: one definition for TOML and flags, unknown keys refused, all problems at once."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2ray.config import ExtractConfig
from m2ray.errors import ConfigError
from m2ray.option_text import parse_layers
from m2ray.sizes import parse_bytes

REQUIRED = {"model": "m", "prompts": "p", "output": "o"}


@pytest.mark.parametrize(
    ("value", "why"),
    [("2024-01-01", "type date"), ("2024-01-01T10:00:00", "type datetime"), ("10:00:00", "type time"), ("inf", "Out of range")],
)
def test_template_options_that_json_cannot_say_are_refused(tmp_path: Path, value: str, why: str) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(f'model = "m"\nprompts = "p"\noutput = "o"\n[template_options.deep]\nday = {value}\n')
    with pytest.raises(ConfigError, match=rf"template_options = .* is not JSON, where a date is text: .*{why}"):
        ExtractConfig.from_sources(toml, {})
    toml.write_text(toml.read_text().replace(value, f'"{value}"'))
    assert ExtractConfig.from_sources(toml, {}).template_options == {"deep": {"day": value}}


def test_flags_lie_over_the_file(tmp_path: Path) -> None:
    toml = tmp_path / "job.toml"
    toml.write_text('model = "m"\nprompts = "p"\noutput = "o"\nlayers = 3\nstages = 4\n', encoding="utf-8")
    config = ExtractConfig.from_sources(toml, {"stages": "2", "compute_dtype": "float32"})
    assert (config.layers, config.stages, config.compute_dtype, config.store_dtype) == ("3", 2, "float32", "bfloat16")


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ExtractConfig.validated({"model": "m", "output": "o", "stages": "0", "sites": "nowhere", "replica": 2})
    text = str(caught.value)
    assert "4 problems" in text
    for name in ("'prompts' is missing", "stages = '0'", "sites = 'nowhere'", "no option 'replica'"):
        assert name in text


def test_a_date_that_is_none_is_told_what_one_looks_like() -> None:
    with pytest.raises(ConfigError, match=r"template_date = '3 Feb' is not a date such as 2026-02-28 or 'auto'\."):
        ExtractConfig.validated({**REQUIRED, "template_date": "3 Feb"})


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("limit", True, "a number"),
        ("stages", True, "a number or 'auto'"),
        ("quarantine_limit", True, "a number"),
        ("template_timeout_s", float("inf"), "less than or equal to 1000000"),
        ("stage_timeout_s", 1e300, "less than or equal to 1000000"),
        ("limit", 1 << 63, "less than 9223372036854775808"),
        ("threads_per_stage", 1 << 33, "less than or equal to 4096"),
    ],
)
def test_what_is_no_number_or_what_the_system_cannot_count_is_refused(option: str, value: object, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"{option} = .* is not .*{why}"):
        ExtractConfig.validated({**REQUIRED, option: value})


def test_a_configuration_is_frozen() -> None:
    config = ExtractConfig.validated(REQUIRED)
    with pytest.raises(ValueError, match="frozen"):
        config.layers = "1"  # type: ignore[misc]


@pytest.mark.parametrize(("text", "message"), [("[model", "not valid TOML"), (None, "Cannot read")])
def test_an_unreadable_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    toml = tmp_path / "job.toml"
    if text is not None:
        toml.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        ExtractConfig.from_sources(toml, {})
    assert str(toml) in str(caught.value)


@given(st.sets(st.integers(0, 61), min_size=1))
def test_layers_round_trip(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, layers)), 62) == tuple(sorted(layers))


@pytest.mark.parametrize(
    ("text", "expected"), [("all", tuple(range(6))), ("0", (0,)), ("0-5", (0, 1, 2, 3, 4, 5)), ("0, 3-4,4", (0, 3, 4))]
)
def test_layer_ranges_hold_both_ends(text: str, expected: tuple[int, ...]) -> None:
    assert parse_layers(text, 6) == expected


@pytest.mark.parametrize(
    ("text", "why"), [("6", "out of range"), ("4-9", "out of range"), ("5-2", "backwards"), ("a", "neither"), ("-1", "neither")]
)
def test_bad_layers_say_why(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_layers(text, 6)


@pytest.mark.parametrize(("text", "expected"), [("40GB", 40 * 10**9), ("40GiB", 40 * 2**30), ("1.5 MiB", 3 * 2**19), ("77", 77)])
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text, "in_flight") == expected


@pytest.mark.parametrize("text", ["", "GB", "4 parsecs", "0GB", "-1GB"])
def test_bad_sizes_name_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="in_flight"):
        parse_bytes(text, "in_flight")


def test_planes_are_for_16_bits() -> None:
    values = {"model": "m", "prompts": "p", "output": "o", "compression": "planes"}
    assert ExtractConfig.validated(values).compression == "planes"
    with pytest.raises(ConfigError, match='splits 16-bit rows, and store_dtype = "float32"'):
        ExtractConfig.validated(values | {"store_dtype": "float32"})
