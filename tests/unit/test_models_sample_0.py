"""docs/models.md is right about half of a seeded tenth of the types that no other test names."""

from pathlib import Path

import pytest

from tests.model_page import assert_page_is_right, sample


@pytest.mark.parametrize("model_type", sample(0))
def test_what_the_page_says_is_found(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_page_is_right(model_type, tmp_path, monkeypatch)
