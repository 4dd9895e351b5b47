"""The survey of many short prompts against `tokenizers`' own `encode_batch` of the same texts and reading them, each in a process of its own.

    python -m benchmarks.survey_speed [--rows 1000000] [--pairs 3]

The baseline reads the lines with `json` and gives their texts to `encode_batch` 8,192 at a time, on all cores too. It keeps nothing. The
survey reads, tokenises, checks and digests each row, writes `sequences/`, keeps the token ids on disk and cuts shards. The tokenizer is a
byte-level BPE of 16,384 tokens, trained on such texts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.records import Row, record

VOCAB_SIZE, WORDS, BATCH_ROWS = 16384, 30000, 8192


def texts(rows: int) -> Iterator[str]:
    """Prompts of 4 to 20 words, some often and most of them seldom."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    words = ["".join(letters[np.minimum(draw.geometric(0.12, size), 26) - 1]) for size in draw.integers(1, 11, WORDS)]
    for _ in range(rows):
        yield " ".join(words[number] for number in np.minimum(draw.zipf(1.3, draw.integers(4, 21)), WORDS) - 1)


def prepare(folder: Path, rows: int) -> None:
    """The prompts and a model's tokenizer."""
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts(rows))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(texts(50_000), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}))


def survey_rows(folder: Path) -> float:
    """Seconds of the survey."""
    from m2ray.options import PromptOptions
    from m2ray.prompts import PromptSource, PromptTokenizer, survey
    from m2ray.storage import LocalStore

    options = PromptOptions(str(folder / "prompts.jsonl"), 4096)
    source, tokenizer = PromptSource.open(options), PromptTokenizer.load(str(folder), options, VOCAB_SIZE)
    with TemporaryDirectory(dir=folder) as run:
        begin = time.perf_counter()
        survey(source, tokenizer, LocalStore(Path(run)), "a", 32768).tokens.close()
        return time.perf_counter() - begin


def encode_rows(folder: Path) -> float:
    """Seconds of reading and encode_batch."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin = time.perf_counter()
    with (folder / "prompts.jsonl").open(encoding="utf-8") as file:
        while lines := list(islice(file, BATCH_ROWS)):
            tokenizer.encode_batch([json.loads(line)["text"] for line in lines])
    return time.perf_counter() - begin


SIDES = {"survey": survey_rows, "encode_batch": encode_rows}


def in_process(side: str, folder: Path) -> tuple[float, int]:
    """Seconds, and the most memory in bytes that the process had."""
    command = [sys.executable, "-m", "benchmarks.survey_speed", "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600)
    taken_s, peak_bytes = json.loads(done.stdout.splitlines()[-1])
    return taken_s, peak_bytes


def measure(folder: Path, rows: int, pairs: int) -> Row:
    prepare(folder, rows)
    taken = [(in_process("survey", folder), in_process("encode_batch", folder)) for _ in range(pairs)]
    ours_s, theirs_s = (statistics.median(pair[side][0] for pair in taken) for side in (0, 1))
    ratios = sorted(ours / theirs for (ours, _), (theirs, _) in taken)
    peak_bytes = max(peak for (_, peak), _ in taken)
    note = (
        f"{rows:,} prompts of {(folder / 'prompts.jsonl').stat().st_size / rows:.0f} bytes; {peak_bytes / 1e6:.0f} MB at the most (target 600), Python and "
        f"transformers included; median of {pairs} pairs, {ratios[0]:.2f} to {ratios[-1]:.2f}; load of the machine {os.getloadavg()[1]:.0f}"
    )
    baseline = "json and tokenizers' encode_batch"
    return Row("survey, JSONL", rows / ours_s, "rows/s", rows / theirs_s, baseline, statistics.median(ratios), "time: 1.2 or less", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        taken_s = SIDES[options.side](options.folder)
        peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(json.dumps([taken_s, peak << 10]))
        return
    with TemporaryDirectory() as folder:
        row = measure(Path(folder), options.rows, options.pairs)
    record("survey_speed", "The survey of short prompts", [row])


if __name__ == "__main__":
    main()
