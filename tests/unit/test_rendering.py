"""A chat template has a limit of time, memory and output for each row; what it costs an ordinary one is a process beside this one."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from m2ray.errors import M2rayError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptRow, PromptSource, PromptTokenizer, rendering, survey
from m2ray.prompts.rendering import RefusedError, Rendered, Renderer
from m2ray.prompts.rows import MAX_PROMPT_BYTES
from m2ray.storage import LocalStore

TINY = Path(__file__).parents[1] / "data" / "prompts" / "tokenizer"

# Some seconds of loops at most, and nothing else: a limit of a tenth of a second ends them.
SLOW = "{% if messages[0].content == 'slow' %}{% for a in range(300) %}{% for b in range(300) %}{% for c in range(40) %}{% endfor %}{% endfor %}{% endfor %}{% endif %}"
TEMPLATE = SLOW + "{% if messages[0].content == 'long' %}{{ 'x' * 5000000 }}{% endif %}{{ messages[0].content }}"


def row(number: int, content: str) -> PromptRow:
    return PromptRow(number, str(number), messages=[{"role": "user", "content": content}], num_bytes=len(content))


@pytest.fixture
def tokenizer() -> Iterator[PromptTokenizer]:
    before = set(multiprocessing.active_children())  # other tests' tokenizers, which nobody has collected yet
    made = AutoTokenizer.from_pretrained(TINY)
    made.chat_template = TEMPLATE
    one = PromptTokenizer(made, "", PromptOptions("p", max_length=10_000_000, template_timeout_s=0.1), len(made))
    yield one
    one.close()
    assert set(multiprocessing.active_children()) <= before


def reasons(encoded: list[Any]) -> list[str | None]:
    return [one if isinstance(one, str) else None for one in encoded]


def test_a_row_that_takes_too_long_is_quarantined_and_the_others_are_not(tokenizer: PromptTokenizer) -> None:
    contents = ["one", "slow", "two", "slow", *["three"] * 100]
    found = tokenizer.encode([row(number, content) for number, content in enumerate(contents)])
    late = "the chat template took longer than template_timeout_s = 0.1"
    assert reasons(found) == [late if content == "slow" else None for content in contents]
    alone = tokenizer.encode([row(0, "three")])[0]
    assert [one.tolist() for one in found[4:]] == [alone.tolist()] * 100  # type: ignore[union-attr]


def test_a_row_of_too_much_text_is_quarantined(tokenizer: PromptTokenizer) -> None:
    found = reasons(tokenizer.encode([row(0, "long"), row(1, "short")]))
    assert found == [f"the chat template makes 5000004 bytes of it, more than {MAX_PROMPT_BYTES}", None]


def test_a_row_that_is_nested_too_deeply_for_the_pipe_costs_itself_alone(tokenizer: PromptTokenizer) -> None:
    """JSON is read twice as deep as a pickle is written."""
    nested: list[Any] = []
    for _ in range(2000):
        nested = [nested]
    deep = PromptRow(1, "1", messages=[{"role": "user", "content": "deep", "more": nested}], num_bytes=4000)
    found = tokenizer.encode([row(0, "one"), deep, row(2, "one")])
    assert reasons(found) == [None, "nested too deeply to be handed to the chat template", None]
    assert found[0].tolist() == found[2].tolist()  # type: ignore[union-attr]


def test_a_row_that_takes_too_much_memory_is_quarantined(monkeypatch: pytest.MonkeyPatch) -> None:
    def render(row: PromptRow) -> Rendered:
        return Rendered("x" if row.sequence_id else str(len(bytes(2 << 30))))

    monkeypatch.setattr(rendering, "RENDER_BYTES", 32 << 20)
    renderer = Renderer(render, 5.0)
    refused, fine = renderer.rendered([row(0, "a"), row(1, "b")])
    assert str(refused) == "the chat template takes more than 33,554,432 bytes of memory"
    assert fine == Rendered("x")
    renderer.close()


def test_a_process_that_ends_by_itself_costs_its_row_alone() -> None:
    def render(row: PromptRow) -> Rendered:
        return os._exit(3) if row.sequence_id == 2 else Rendered(str(row.sequence_id))  # type: ignore[func-returns-value]

    renderer = Renderer(render, 5.0)
    found = list(renderer.rendered([row(number, "a") for number in range(5)]))
    said = [str(one) if isinstance(one, RefusedError) else one.text for one in found]
    assert said == ["0", "1", "the chat template ended its process (exit code 3)", "3", "4"]
    assert isinstance(found[2], RefusedError)
    renderer.close()


def test_the_process_is_gone_once_nobody_asks(tmp_path: Path) -> None:
    """Also where the driver is killed: its end of the pipe closes."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        renderer = Renderer(lambda _: Rendered("x"), 5.0)
        list(renderer.rendered([row(0, "a")]))
        os.write(write, str(renderer._process.pid).encode())
        signal.pause()
    child = int(os.read(read, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text()
    os.close(read)
    os.close(write)


def test_a_survey_quarantines_slow_rows_and_leaves_no_process(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"messages": [{"role": "user", "content": content}]}) for content in ("one", "slow", "two")]
    path.write_text("\n".join(lines))
    source = PromptSource.open(PromptOptions(str(path), max_length=1000))
    before = set(multiprocessing.active_children())
    found = survey(source, tokenizer, LocalStore(tmp_path / "run"), "a", 1000)
    found.tokens.close()
    assert (found.num_ready, found.num_quarantined) == (2, 1)
    assert set(multiprocessing.active_children()) <= before


def test_as_long_a_time_limit_as_may_be_asked_for_is_one_that_the_system_can_wait_for() -> None:
    renderer = Renderer(lambda _: Rendered("a"), 1_000_000)
    assert list(renderer.rendered([row(number, "one") for number in range(64)])) == [Rendered("a")] * 64
    renderer.close()


def test_the_limit_decides_the_rows_of_chats_alone(tokenizer: PromptTokenizer, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    (tmp_path / "text.jsonl").write_text('{"text": "a"}')
    settled = {
        kind: tokenizer.settled(PromptSource.open(PromptOptions(str(tmp_path / f"{kind}.jsonl"), max_length=9)).columns).template_timeout_s
        for kind in ("chat", "text")
    }
    assert settled == {"chat": 0.1, "text": None}
    with pytest.raises(M2rayError, match="template_timeout_s"):
        from m2ray.config import ExtractConfig

        ExtractConfig.validated({"model": "m", "prompts": "p", "output": "o", "template_timeout_s": 0})
