"""flex_attention as it runs: compiled. In a file of its own, since torch takes its time."""

from pathlib import Path

from tests.reference import chain_rows, load_chain, make_family, micro_batch_of


def test_compiled_flex_is_within_rounding(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "llama", "llama")
    flex, eager = (load_chain(folder, (0, 2, 5), "float32", attn=attn) for attn in ("flex_attention", "eager"))
    micro_batch = micro_batch_of((150, 70), 96)
    for ours, theirs in zip(chain_rows(flex, micro_batch), chain_rows(eager, micro_batch), strict=True):
        assert ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max() < 1e-5
