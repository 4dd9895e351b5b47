"""docs/models.md is of the transformers that constraints.txt pins, has every causal type of it, and counts right."""

import re
from pathlib import Path

import transformers

from scripts.model_outcomes import PROVED, causal_types, outcomes_on_page, page_of, sites_on_page

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_script_writes_of_the_pinned_release() -> None:
    outcomes = outcomes_on_page()
    pinned = re.search(r"^transformers==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert transformers.__version__ == pinned[1], "install with -c constraints.txt, or take the newer release and run scripts/models"
    assert list(outcomes) == causal_types()
    assert (ROOT / "docs" / "models.md").read_text() == page_of(outcomes, sites_on_page())


def test_at_least_110_types_are_proved_and_none_fails_without_a_word() -> None:
    outcomes = outcomes_on_page()
    assert sum(outcome == PROVED for outcome in outcomes.values()) >= 110
    assert [
        each for each in outcomes.items() if "NOT FINISHED" in each[1] or "WITHOUT AN OUTCOME" in each[1] or "Traceback" in each[1]
    ] == []


def test_of_transformers_own_defaults_none_is_called_damaged() -> None:
    assert [each for each in outcomes_on_page().items() if "damaged" in each[1].lower()] == []


def test_each_proved_type_has_a_row_of_sites_and_none_in_doubt() -> None:
    sites = sites_on_page()
    assert list(sites) == [model_type for model_type, outcome in outcomes_on_page().items() if outcome == PROVED]
    assert [each for each in sites.items() if "NOT PROVED" in each[1] or not each[1]] == []
