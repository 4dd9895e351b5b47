"""From prompts to a draft model: extract, export, and train speculators' own EAGLE-3 draft on it. A GPU is not needed.

    pip install speculators==0.9.0
    python examples/train_draft.py MODEL PROMPTS OUTPUT --mask assistant

speculators pins an older transformers than m2ray's: give it an environment of its own, and by --m2ray the command of m2ray's.
PROMPTS are chats, of which the assistant's tokens are learnt; or, without --mask, rows of input_ids and loss_mask. OUTPUT gets three
folders, run, export and draft. What is there already is kept: extraction and export go on where they were.
"""

import argparse
import subprocess
from pathlib import Path
from typing import Any

import torch
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.models.eagle3.data import shift_batch
from speculators.train import data
from torch.utils.data import DataLoader
from transformers import AutoConfig


def eagle_layers(num_layers: int) -> list[int]:
    """m2ray's numbers of the layers that EAGLE-3 takes, and the last one; speculators' ids are greater by one."""
    return [1, num_layers // 2 - 1, num_layers - 4, num_layers - 1]


def batches_of(export: Path, max_length: int, batch_size: int) -> Any:
    """The data set and loader of speculators: packed batches of `max_length` tokens."""
    rows = data.ArrowDataset(max_len=max_length, datapath=str(export), on_missing="raise", hidden_states_dtype=torch.float32)
    width = rows[0]["verifier_last_hidden_states"].shape[1]
    collate = data.CollateFn(max_length, width, dtype=torch.float32, preprocess=shift_batch)
    return DataLoader(rows, batch_size=batch_size, shuffle=True, generator=torch.Generator().manual_seed(0), collate_fn=collate)


def draft_of(model: Path, layers: list[int]) -> Any:
    """The EAGLE-3 draft that speculators makes of the model, of one layer, with the model's own embedding, head and norm."""
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = 1
    return Eagle3DraftModel.from_training_args(
        config,
        draft_vocab_size=config.vocab_size,
        norm_before_residual=False,
        ttt_steps=3,
        target_layer_ids=[layer + 1 for layer in layers[:-1]],
        verifier_name_or_path=str(model),
        draft_attn_impl="eager",  # flex attention has no backward pass on a CPU
    )


def train(draft: Any, batches: Any, steps: int, learning_rate: float) -> list[float]:
    """Steps of AdamW on the draft's own loss, as its trainer takes them. Returns the loss of each."""
    # Its fused losses are kernels for a GPU.
    how, _ = draft.get_trainer_kwargs(loss_fn="kl_div", loss_implementation="eager", ttt_steps=3, ttt_step_loss_decay=1.0)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=learning_rate)
    losses: list[float] = []
    draft.train()
    while True:
        for batch in batches:
            if len(losses) == steps:
                return losses
            _, loss, _ = draft(**batch, **how)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))


def call(*words: str) -> None:
    """Run a command; one that fails has said why, and ends this one too."""
    if code := subprocess.run(words, check=False).returncode:
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("prompts", help="file or folder")
    parser.add_argument("output", type=Path, help="folder for run, export and draft")
    parser.add_argument("--m2ray", default="m2ray", help="the command of m2ray")
    parser.add_argument("--mask", help='"assistant" for chats')
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a batch")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a batch, at most")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    torch.manual_seed(0)

    layers = eagle_layers(AutoConfig.from_pretrained(options.model).get_text_config().num_hidden_layers)
    run, export = options.output / "run", options.output / "export"
    masked = ["--mask", options.mask] if options.mask else []
    named = ["--model", str(options.model), "--prompts", options.prompts, "--output", str(run)]
    call(options.m2ray, "extract", *named, "--layers", ",".join(map(str, layers)), *masked)
    call(options.m2ray, "export", str(run), "--to", "speculators", "--output", str(export))

    draft = draft_of(options.model, layers)
    losses = train(draft, batches_of(export, options.max_length, options.batch_size), options.steps, options.learning_rate)
    print(f"loss: {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last of {len(losses)}")
    draft.save_pretrained(options.output / "draft")


if __name__ == "__main__":
    main()
