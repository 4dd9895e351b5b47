"""docs/models.md is right about ten named types: experts."""

from pathlib import Path

import pytest

from tests.model_page import EXPERTS, assert_page_is_right


@pytest.mark.parametrize("model_type", EXPERTS)
def test_what_the_page_says_is_found(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_page_is_right(model_type, tmp_path, monkeypatch)
