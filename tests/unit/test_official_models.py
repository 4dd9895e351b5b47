"""Official models' own configurations come out as docs/official_models.md says."""

import pytest

from scripts.official_models import PAGE, models, row_of

ON_PAGE = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]


def test_each_model_has_its_row() -> None:
    assert [row.split(" | ")[0].removeprefix("| ") for row in ON_PAGE] == models()


@pytest.mark.parametrize("model", models())
def test_what_the_page_says_is_what_comes_out(model: str) -> None:
    row = row_of(model)
    assert row in ON_PAGE, f"the row should be:\n{row}"
