"""Beginning a run: job.json and what it names belong together, whatever the store, another driver or a hand on the prompts does."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m2ray.activations.job import read_job
from m2ray.audit.tokens import open_source, open_tokenizer
from m2ray.chain import beginning
from m2ray.chain.checking import look
from m2ray.chain.probing import Hardware
from m2ray.chain.progress import Progress
from m2ray.chain.stopping import Stop
from m2ray.config import ExtractConfig
from m2ray.errors import ClusterError, RunConflictError, StoreError
from m2ray.planning.hardware import Cluster, Gpu, Node
from m2ray.prompts import PromptTokenizer, load_shards
from m2ray.prompts.masks import Marked
from m2ray.storage import LocalStore
from tests.reference import make_minimax

MANY = Gpu(0, "NVIDIA H200", 150 * 10**9, 150 * 10**9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("model") / "model", "fp8")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> ExtractConfig:
    (tmp_path / "prompts.txt").write_text("".join(f"sea wind stone {number}\n" for number in range(30)))
    options: dict[str, Any] = {"batch_tokens": 256, "shard_tokens": 300, "compile": False}
    return ExtractConfig(model=str(model), prompts=str(tmp_path / "prompts.txt"), output=str(tmp_path / "run"), **options)


@pytest.fixture
def while_ray_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], object]]]:
    """What is done once the prompts were surveyed, and before the run is claimed."""
    steps: list[Callable[[], object]] = []

    def hardware(*_: object) -> Hardware:
        while steps:
            steps.pop(0)()
        return Hardware(Cluster((Node("here", (MANY,)),)), {"here": "0"}, {"here": 8.0})

    monkeypatch.setattr(beginning, "_hardware", hardware)
    return steps


def begin(config: ExtractConfig, store: LocalStore | None = None) -> beginning.Work:
    inputs = look(config)
    if store:
        inputs = replace(inputs, store=store)
    with ExitStack() as stack, Progress() as progress:
        return beginning.begin(inputs, stack, Stop(), progress)


def go_on(config: ExtractConfig) -> beginning.Work:
    with ExitStack() as stack, Progress() as progress:
        return beginning.resume(look(config), stack, Stop(), progress)


def surveys(config: ExtractConfig) -> list[str]:
    return sorted(key for key, _ in LocalStore(Path(config.output)).list("sequences"))


class Failing(LocalStore):
    """A disk that does what it is told and says that it failed, or fails from a moment on."""

    def __init__(self, root: str, at: str) -> None:
        super().__init__(Path(root))
        self.at = at
        self.is_claimed = False

    def create(self, key: str, data: Any) -> None:
        super().create(key, data)
        if key == "job.json":
            self.is_claimed = True
            if self.at == "answer":
                raise StoreError("the answer was lost")

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        if self.is_claimed and self.at == "listing":
            raise StoreError("the disk is gone")
        return super().list(prefix)

    def delete_unfinished(self) -> int:
        if self.is_claimed and self.at == "sweep":
            raise StoreError("the disk is gone")
        return super().delete_unfinished()


@pytest.mark.usefixtures("while_ray_starts")
@pytest.mark.parametrize("at", ["answer", "listing", "sweep"])
def test_what_job_json_names_stays_after_an_error_of_the_store(config: ExtractConfig, at: str) -> None:
    with pytest.raises(StoreError):
        begin(config, Failing(config.output, at))
    recorded = read_job(LocalStore(Path(config.output)))
    assert [file.key for file in recorded.sequence_files] == surveys(config)
    work = go_on(config)
    assert len(work.run.missing(work.shards)) == recorded.num_shards > 0


def test_before_job_json_a_survey_is_deleted_on_the_way_out(config: ExtractConfig, while_ray_starts: list[Callable[[], object]]) -> None:
    def no_room() -> None:
        assert surveys(config)
        raise ClusterError("no room")

    while_ray_starts.append(no_room)
    with pytest.raises(ClusterError):
        begin(config)
    assert surveys(config) == []


@pytest.mark.usefixtures("while_ray_starts")
def test_a_disk_without_room_for_the_rows_is_refused_before_the_claim(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2ray.chain.checking.disk_free_bytes", lambda _: 1000)
    with pytest.raises(ClusterError, match=r"bytes of disk .* too little"):
        begin(config)
    assert surveys(config) == []
    assert read_job(LocalStore(Path(config.output))) is None


def test_prompts_that_change_between_the_survey_and_the_claim_are_not_those_of_the_run(
    config: ExtractConfig, while_ray_starts: list[Callable[[], object]]
) -> None:
    before = look(config).source.fingerprint()
    while_ray_starts.append(lambda: Path(config.prompts).write_text("other prompts\n" * 60))
    work = begin(config)
    assert work.run.job.fingerprints["prompts"] == before
    assert work.run.job.counts.sequences == 30
    with pytest.raises(RunConflictError, match=r"fingerprints\.prompts"):
        go_on(config)


@pytest.mark.usefixtures("while_ray_starts")
def test_a_run_goes_on_with_the_template_that_it_began_with_wherever_it_lies(config: ExtractConfig, tmp_path: Path) -> None:
    for name, text in {
        "own": "{{ messages[0].content }}",
        "moved": "{{ messages[0].content }}",
        "other": "{{ messages[0].content }}!",
    }.items():
        (tmp_path / f"{name}.jinja").write_text(text)
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "sea wind stone"}]}\n' * 30)

    def of(name: str) -> ExtractConfig:
        return config.model_copy(update={"prompts": str(tmp_path / "chats.jsonl"), "chat_template": str(tmp_path / f"{name}.jinja")})

    job = begin(of("own")).run.job
    assert job.names["chat_template"] == str(tmp_path / "own.jinja")
    assert open_tokenizer(job, config.model, 1_000_000).template_digest == job.fingerprints["template"], "the audit's too"
    assert open_source(job, job.names["prompts"]).columns.is_messages, "though no file has a column of tools"
    assert go_on(of("moved")).run.job == job
    with pytest.raises(RunConflictError, match=r"fingerprints\.template"):
        go_on(of("other"))


def test_of_two_drivers_that_begin_the_second_goes_on_by_the_survey_of_the_first(
    config: ExtractConfig, while_ray_starts: list[Callable[[], object]]
) -> None:
    first: list[beginning.Work] = []
    while_ray_starts.append(lambda: first.append(begin(config)))
    second = begin(config)
    assert second.run.job == first[0].run.job
    assert surveys(config) == [file.key for file in second.run.job.sequence_files], "the second one's own is gone"
    assert [shard.index for shard in second.shards] == list(range(second.run.job.num_shards))


def test_two_drivers_whose_surveys_differ_cannot_share_a_run(
    config: ExtractConfig, while_ray_starts: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files, options and template: but a template that writes the date gives other tokens tomorrow, and as many."""
    marked = PromptTokenizer.marked

    def tomorrow() -> None:
        monkeypatch.setattr(PromptTokenizer, "marked", lambda self, rows: [Marked(row.token_ids[::-1]) for row in marked(self, rows)])
        begin(config)
        monkeypatch.setattr(PromptTokenizer, "marked", marked)

    while_ray_starts.append(tomorrow)
    with pytest.raises(RunConflictError, match="gives other tokens"):
        begin(config)
    recorded = read_job(LocalStore(Path(config.output)))
    assert surveys(config) == [file.key for file in recorded.sequence_files]
    assert len(load_shards(LocalStore(Path(config.output)), recorded.sequence_files)) == recorded.num_shards


def test_two_drivers_of_other_prompts_cannot_share_a_run(config: ExtractConfig, while_ray_starts: list[Callable[[], object]]) -> None:
    def other() -> None:
        Path(config.prompts).write_text("".join(f"sea wind store {number}\n" for number in range(30)))
        begin(config)

    while_ray_starts.append(other)
    with pytest.raises(RunConflictError, match=r"fingerprints\.prompts"):
        begin(config)
    recorded = read_job(LocalStore(Path(config.output)))
    assert surveys(config) == [file.key for file in recorded.sequence_files]


@pytest.mark.usefixtures("while_ray_starts")
def test_the_account_of_the_survey_says_which_prompts_and_columns_are_taken(
    config: ExtractConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are options that a person may have forgotten in a file."""
    (tmp_path / "rows.jsonl").write_text('{"text": "sea wind", "label": "wet", "score": 1.5}\n' * 30)
    asked = {"prompts": str(tmp_path / "rows.jsonl"), "keep_columns": ("label", "score"), "limit": 7}
    begin(config.model_copy(update=asked))
    said = capsys.readouterr().out
    assert "7 prompts: 7 ready" in said
    assert "  limit = 7: prompts after the first 7 are left out\n" in said
    assert "  kept in sequences/: label (string), score (double)\n" in said
