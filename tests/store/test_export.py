"""An export from a bucket into a bucket: the files of one on a disk, whole, and made again where they are gone or damaged."""

from pathlib import Path

from m2ray.export.exporting import plan_export, write_export
from m2ray.storage import LocalStore, Store, open_store
from tests.store.conftest import S3Server
from tests.unit import export_runs


def contents(store: Store) -> dict[str, bytes]:
    return {key: store.read(key) for key, _ in store.list("")}


def test_it_is_that_of_a_disk(s3: S3Server, tmp_path: Path) -> None:
    run, out = f"s3://{s3.bucket}/export/run", f"s3://{s3.bucket}/export/out"
    export_runs.finished_run(open_store(run), export_runs.parts())
    export = plan_export(run, "speculators")
    first = write_export(export, "speculators", out)
    write_export(export, "speculators", tmp_path)
    whole = contents(LocalStore(tmp_path))
    assert contents(open_store(out)) == whole
    reports: list[tuple[int, int, int]] = []
    open_store(out).delete(["hidden_states/hs_7.safetensors"])
    open_store(out).put("hidden_states/hs_1.safetensors", b"not it")
    assert write_export(export, "speculators", out, lambda *report: reports.append(report)) == first
    assert contents(open_store(out)) == whole
    _, written, kept = reports[-1]
    assert 0 < written < first["num_bytes"]
    assert kept > 0
