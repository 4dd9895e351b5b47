"""`m2ray inspect --foreign`: dumps as their tools write them, each known fault told by name, and sound ones left in peace."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from m2ray.cli import main
from m2ray.export.foreign import torch_files
from m2ray.export.foreign.dumps import open_dump
from m2ray.prompts.own_tokenizer import own_tokenizer

TOKENIZER = Path(__file__).parents[1] / "data" / "prompts" / "tokenizer"
TEXTS = ("The quick brown fox", "jumps over the lazy dog", "and is gone", "for ever and a day")
WIDTH = 8


def token_ids() -> list[torch.Tensor]:
    tokenizer = own_tokenizer(TOKENIZER)
    return [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]


def states(length: int, planes: int, seed: int) -> torch.Tensor:
    """bfloat16 [T, L, W]."""
    return torch.randn(length, planes, WIDTH, generator=torch.Generator().manual_seed(seed)).bfloat16()


Contents = list[dict[str, Any]]
"""A dump's samples: `ids` and `mask` [T], `states` [T, 4, W]."""


def sound() -> Contents:
    return [
        {"ids": ids, "mask": torch.arange(len(ids)) % 2, "states": states(len(ids), 4, seed)}
        for seed, ids in enumerate(token_ids(), start=1)
    ]


def as_speculators(folder: Path, contents: Contents) -> None:
    rows = {
        "input_ids": [one["ids"].tolist() for one in contents],
        "loss_mask": [one["mask"].tolist() for one in contents],
        "seq_len": [len(one["ids"]) for one in contents],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(folder)
    (folder / "hidden_states").mkdir()
    for index, one in enumerate(contents):
        tensors = {"token_ids": one["ids"], "hidden_states": one["states"].contiguous()}
        save_file(tensors, folder / "hidden_states" / f"hs_{index}.safetensors")


def as_specforge(folder: Path, contents: Contents) -> None:
    rows = folder / "rows_0-2000"
    rows.mkdir(parents=True)
    for index, one in enumerate(contents):
        content = {
            "input_ids": one["ids"],
            "loss_mask": one["mask"],
            "hidden_state": one["states"][:, 3].contiguous()[None],
            "aux_hidden_state": one["states"][:, :3].flatten(1)[None],
        }
        torch.save(content, rows / f"data_{index}.ckpt")
    packed = rows / "data_1.ckpt"  # one of them as --compress leaves it
    (rows / "data_1.ckpt.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()


def as_modelopt(folder: Path, contents: Contents) -> None:
    folder.mkdir()
    for index, one in enumerate(contents):
        content = {
            "input_ids": one["ids"],
            "hidden_states": one["states"][:, 3].contiguous(),
            "aux_hidden_states": one["states"][:, :3].flatten(1),
            "loss_mask": one["mask"],
            "conversation_id": f"c{index}",
        }
        torch.save(content, folder / f"c{index}.pt")


WRITERS = {"speculators": as_speculators, "SpecForge": as_specforge, ".pt files": as_modelopt}


def inspect(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["inspect", "--foreign", str(folder), *options])


def faults(folder: Path, *options: str) -> dict[str, list[str]]:
    """The samples of each kind of fault that was told."""
    result = inspect(folder, "--json", *options)
    facts = json.loads(result.stdout)
    assert result.exit_code == (1 if facts["faults"] else 0), result.output
    return {kind: [one["sample"] for one in found["first"]] for kind, found in facts["faults"].items()}


@pytest.mark.parametrize("layout", WRITERS)
def test_a_sound_dump_is_without_fault(layout: str, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path / "dump", sound())
    facts = json.loads(inspect(tmp_path / "dump", "--json", "--tokenizer", str(TOKENIZER)).stdout)
    num_tokens = sum(map(len, token_ids()))
    assert (facts["layout"], facts["files"], facts["samples"], facts["tokens"]) == (layout, 4, 4, num_tokens)
    assert (len(facts["planes"]), facts["faults"], facts["text_compared"]) == (4, {}, True)
    assert "No fault was found." in inspect(tmp_path / "dump").stdout


def zero_plane(contents: Contents) -> None:
    contents[1]["states"][:, 2] = 0


def zero_rows(contents: Contents) -> None:
    contents[1]["states"][-1, 2] = 0


def not_a_number(contents: Contents) -> None:
    contents[1]["states"][0, 0, 3] = float("nan")


def infinite(contents: Contents) -> None:
    contents[1]["states"][0, 3, 3] = float("-inf")


def equal_planes(contents: Contents) -> None:
    contents[1]["states"][:, 1] = contents[1]["states"][:, 2]


def same_sample(contents: Contents) -> None:
    contents[1] = contents[0]


def same_states(contents: Contents) -> None:
    ids = contents[0]["ids"].flip(0)
    contents[1] = contents[0] | {"ids": ids}


def zero_mask(contents: Contents) -> None:
    contents[1]["mask"] *= 0


def odd_mask(contents: Contents) -> None:
    contents[1]["mask"] += 1


def cut_states(contents: Contents) -> None:
    contents[1]["states"] = contents[1]["states"][:-1]


FAULTS = {
    "zero_plane": zero_plane,
    "zero_rows": zero_rows,
    "not_finite": not_a_number,
    "equal_planes": equal_planes,
    "same_tokens": same_sample,
    "same_states": same_states,
    "zero_mask": zero_mask,
    "mask_values": odd_mask,
    "lengths": cut_states,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_each_known_fault_is_told_of_its_sample_and_no_other(layout: str, tmp_path: Path) -> None:
    for kind, spoil in (*FAULTS.items(), ("not_finite", infinite)):
        contents = sound()
        spoil(contents)
        folder = tmp_path / spoil.__name__
        WRITERS[layout](folder, contents)
        told = faults(folder)
        assert list(told) == [kind], spoil
        assert [("1" in name) for name in told[kind]] == [True], told


def test_tokens_that_are_not_the_tokenizers(tmp_path: Path) -> None:
    contents = sound()
    contents[1]["ids"][0] = 10**6
    letters = own_tokenizer(TOKENIZER)(["s", "t", "o", "n", "e"], add_special_tokens=False)["input_ids"]  # it has a token for "stone"
    ids = torch.cat([*map(torch.tensor, letters), contents[2]["ids"]])
    contents[2] = {"ids": ids, "mask": torch.ones(len(ids)), "states": states(len(ids), 4, 9)}
    as_modelopt(tmp_path / "dump", contents)
    assert faults(tmp_path / "dump") == {}
    assert faults(tmp_path / "dump", "--tokenizer", str(TOKENIZER)) == {"vocabulary": ["c1.pt"], "other_tokens": ["c2.pt"]}


def test_a_sequence_that_was_cut_within_a_character_is_no_fault(tmp_path: Path) -> None:
    ids = torch.tensor(own_tokenizer(TOKENIZER)("gone 龘", add_special_tokens=False)["input_ids"])[:-1]
    as_modelopt(tmp_path / "dump", [{"ids": ids, "mask": torch.ones(len(ids)), "states": states(len(ids), 4, 1)}])
    assert faults(tmp_path / "dump", "--tokenizer", str(TOKENIZER)) == {}


def test_a_data_set_and_its_states_that_do_not_belong_together(tmp_path: Path) -> None:
    as_speculators(tmp_path / "dump", sound())
    folder = tmp_path / "dump" / "hidden_states"
    (folder / "hs_0.safetensors").rename(folder / "hs_17.safetensors")
    (folder / "hs_1.safetensors").rename(folder / "hs_0.safetensors")
    told = faults(tmp_path / "dump")
    assert told == {"tokens_disagree": ["hs_0.safetensors"], "lengths": ["hs_0.safetensors"], "missing": ["row 1", "hs_17.safetensors"]}


def test_states_in_fp8_are_looked_at_with_their_scales(tmp_path: Path) -> None:
    contents = sound()
    as_speculators(tmp_path / "dump", contents)
    for index, one in enumerate(contents):
        scales = torch.full((len(one["ids"]), 1, 1), 0.5)
        scales[0] *= index != 1  # which makes the first row of sample 1 zero
        tensors = {"token_ids": one["ids"], "hidden_states": one["states"].to(torch.float8_e4m3fn), "hidden_states_scales": scales}
        save_file(tensors, tmp_path / "dump" / "hidden_states" / f"hs_{index}.safetensors")
    assert faults(tmp_path / "dump") == {"zero_rows": ["hs_1.safetensors"]}


def test_hooks_of_activault_side_by_side(tmp_path: Path) -> None:
    """Their batches have an axis of sequences; layer 2 comes before layer 10."""
    ids = torch.arange(3 * 5).reshape(3, 5)
    for seed, layer in enumerate((2, 10)):
        folder = tmp_path / "run" / f"models.layers.{layer}.mlp.post"
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text("{}")
        batch = torch.stack([states(5, 1, 10 * seed + place)[:, 0] for place in range(3)])
        batch[2] *= layer == 2
        torch.save({"states": batch, "input_ids": ids, "tensor_bytes": 480}, folder / "ab--1_0.saved.pt")
    facts = json.loads(inspect(tmp_path / "run", "--json").stdout)
    assert (facts["layout"], facts["files"], facts["other_files"], facts["samples"], facts["tokens"]) == ("activault", 2, 2, 3, 15)
    assert facts["planes"] == ["models.layers.2.mlp.post states", "models.layers.10.mlp.post states"]
    assert [one["sample"] for one in facts["faults"]["zero_plane"]["first"]] == ["ab--1_0.saved.pt [2]"]
    assert list(facts["faults"]) == ["zero_plane"]


def test_what_is_no_tensors_is_refused_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code in a pickle, a tensor larger than its bytes, another format, too large a pickle or gzip: told, and the others are looked at."""
    folder = tmp_path / "dump"
    as_modelopt(folder, sound())
    torch.save({"states": torch.zeros(1), "f": os.getcwd}, folder / "d0.pt")
    torch.save({"states": torch.zeros(1).expand(1000, 8)}, folder / "d1.pt")
    torch.save({"states": torch.ones(3, 8)}, folder / "d2.pt", _use_new_zipfile_serialization=False)
    torch.save([torch.ones(3, 8)], folder / "d3.pt")
    torch.save({"input_ids": torch.arange(3)}, folder / "d4.pt")
    result = inspect(folder, "--json")
    unreadable = json.loads(result.stdout)["faults"]["unreadable"]["first"]
    assert [one["sample"] for one in unreadable] == [f"d{index}.pt" for index in range(5)]
    for one, word in zip(unreadable, ("getcwd", "8,000 values", "torch 1.6", "a list", "no states"), strict=True):
        assert word in one["what"]
    assert json.loads(result.stdout)["samples"] == 9

    monkeypatch.setattr(torch_files, "MAX_PICKLE_BYTES", 100)
    assert len(faults(folder)["unreadable"]) == 9
    monkeypatch.setattr(torch_files, "MAX_UNPACKED_BYTES", 100)
    (folder / "e.ckpt.gz").write_bytes(gzip.compress((folder / "c0.pt").read_bytes()))
    assert "unpacks to more than 100 bytes" in inspect(folder).stdout


def test_one_sample_is_read_at_a_time(tmp_path: Path) -> None:
    as_modelopt(tmp_path / "dump", sound())
    samples = open_dump(tmp_path / "dump").samples()
    next(samples)
    (tmp_path / "dump" / "c1.pt").write_bytes(b"not yet read")
    assert [problem.kind for problem in next(samples).problems] == ["unreadable"]


def test_what_is_no_dump_is_refused_with_the_layouts_that_are_known(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        result = inspect(folder)
        assert result.exit_code == 1
        assert str(folder) in result.output
    assert "speculators" in inspect(tmp_path).output
    assert inspect(tmp_path, "--tokenizer", str(tmp_path)).exit_code == 1
    assert CliRunner().invoke(main, ["inspect", str(tmp_path), "--tokenizer", "x"]).exit_code == 2
