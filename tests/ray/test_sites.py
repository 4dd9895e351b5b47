"""One run of all nine sites through Ray, read back, and each row what transformers' own modules show."""

from pathlib import Path

import torch

import m2ray
from tests.ray.conftest import RayCluster
from tests.ray.test_extract import micro_batches, minimax, prompts, words  # noqa: F401 - fixtures among them
from tests.reference import MINIMAX_TINY, load_reference, same_bits
from tests.site_reference import FAMILIES, by_hooks

ALL = "residual:all, residual_mid:1, attention:all, mlp:2-4, mlp_in:0, router_logits:all, router_topk:0,6, embedding, final_norm"


def test_all_nine_sites_through_ray_are_transformers_own(cluster: RayCluster, minimax: Path, prompts: Path, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    done = cluster.run("m2ray", "extract", *words(minimax, prompts, run, "--stages", "3", "--sites", ALL))
    assert done.returncode == 0, done.stdout + done.stderr
    reader, reference = m2ray.open_run(run), load_reference(minimax, torch.float32)
    asked = {"residual_mid": (1,), "mlp": (2, 3, 4), "mlp_in": (0,), "router_topk": (0, 6), "embedding": (None,), "final_norm": (None,)}
    asked |= dict.fromkeys(("residual", "attention", "router_logits"), tuple(range(MINIMAX_TINY["layers"])))
    for micro_batch in micro_batches(run):
        expected = by_hooks(reference, FAMILIES["minimax_m2"], micro_batch)
        stop = 0
        for sequence_id, count in zip(micro_batch.sequence_ids.tolist(), micro_batch.token_counts.tolist(), strict=True):
            start, stop = stop, stop + count
            for site, layers in asked.items():
                for layer in layers:
                    view = reader.site(site) if layer is None else reader.site(site).layer(layer)
                    found = view.sequence(sequence_id)
                    columns = (found,) if isinstance(found, torch.Tensor) else tuple(found.values())
                    theirs = [column[start:stop] for column in expected[site, layer]]
                    assert all(same_bits(*pair) for pair in zip(columns, theirs, strict=True)), (site, layer)
