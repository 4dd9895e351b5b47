"""docs/official_models.md has each release whose configuration is known, and is right about a few of them; all take minutes."""

import pytest

from scripts.official_models import PAGE, models, planned, row_of

ON_PAGE = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]


def test_each_release_has_its_row() -> None:
    assert [row.split(" | ")[0].removeprefix("| ") for row in ON_PAGE] == models()
    assert len(models()) >= 30


@pytest.mark.parametrize("model", ["gpt-oss-20b", "Kimi-K3", "Llama-3.2-1B-Instruct", "Phi-3-mini-128k-instruct", "Phi-3.5-MoE-instruct"])
def test_what_the_page_says_is_what_comes_out(model: str) -> None:
    row = row_of(model)
    assert row in ON_PAGE, f"the row should be:\n{row}"


@pytest.mark.parametrize("model", ["DeepSeek-V3", "Kimi-K2.5"])
def test_what_fits_packed_is_said_so(model: str) -> None:
    (row,) = [line for line in ON_PAGE if line.startswith(f"| {model} |")]
    assert planned(model).endswith("fits packed")
    assert planned(model) in row
