"""README is short, and its options table says what ExtractConfig says."""

from pathlib import Path

from pydantic_core import PydanticUndefined

from m2ray.config import ExtractConfig
from m2ray.option_types import legal_values

README = Path(__file__).parents[2] / "README.md"


def test_it_is_read_in_one_sitting() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150


def test_the_options_table_is_true() -> None:
    rows = []
    for name, field in ExtractConfig.model_fields.items():
        default = "" if field.default is PydanticUndefined else f"`{'' if field.default is None else field.default}`".replace("``", "")
        values = legal_values(field.annotation)
        listed = "" if any(value.isupper() for value in values) else f"{', '.join(values)}. "
        rows.append(f"| `{name}` | {default} | {listed}{field.description} |")
    table = "\n".join(rows)
    assert table in README.read_text(encoding="utf-8"), f"the table should be:\n{table}"
