"""A Hugging Face cache as `hf download` leaves it: blobs, and links to them by revision."""

from pathlib import Path

COMMIT, OLDER = "a" * 40, "b" * 40


def cached(repository: Path, files: dict[str, bytes], *commits: str) -> None:
    """A repository of the cache with the same files at each commit; the first commit is main's."""
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commits[0])
    (repository / "blobs").mkdir()
    for commit in commits:
        for name, data in files.items():
            blob = repository / "blobs" / f"{commit[:8]}-{name.replace('/', '-')}"
            blob.write_bytes(data)
            path = repository / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(blob)
