"""docs/models.md is right about ten named types: hybrid."""

from pathlib import Path

import pytest

from tests.model_page import HYBRID, assert_page_is_right


@pytest.mark.parametrize("model_type", HYBRID)
def test_what_the_page_says_is_found(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_page_is_right(model_type, tmp_path, monkeypatch)
