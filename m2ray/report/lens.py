"""The logit lens: what the model would say next if it ended after a layer. Its final norm and head are put on recorded rows."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from m2ray.activations.reading.reader import RunReader
from m2ray.report.elements import paragraph, section, table, text
from m2ray.report.sample import Sampled, Words, in_words, visible

if TYPE_CHECKING:
    import torch

PROMPTS = 5
_LAST_TOKENS = 10
_MOST_ROWS = 4096
_SURE = (0.1, 0.3, 0.6)
"""From these shares on a word is shaded, more and more."""

Lens = Callable[["torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]
"""From rows [N, H] as they were stored to the likeliest next token of each, int64 [N], and its probability, float32 [N]."""


def lens(run: RunReader, prompts: Sequence[Sampled], head: Lens | None, words: Words | None) -> Markup:
    """The section. Raises RunDamagedError or StoreError."""
    title = "Logit lens"
    if head is None or words is None:
        asking = "Give the run's model by --model to see, layer by layer, what it would say next."
        return section("lens", title, paragraph(asking))
    if "residual" not in run.sites:
        return section("lens", title, paragraph("The run did not capture the residual."))
    tables = [_of_prompt(run, prompt, head, words) for prompt in prompts if prompt.num_rows <= _MOST_ROWS]
    return section(
        "lens",
        title,
        paragraph(
            "Below each token of a prompt stands, layer by layer, the word that the model's final norm and head make of its row: what the model "
            "would say next if it ended there. The greener, the surer: from",
            ", ".join(f"{share:.0%}" for share in _SURE),
            "on.",
        ),
        *tables,
    )


def _of_prompt(run: RunReader, prompt: Sampled, head: Lens, words: Words) -> Markup:
    import torch

    residual = run.site("residual")
    layers = residual.layer_numbers
    rows_LTH = torch.stack([residual.layer(layer).sequence(prompt.sequence_id)[-_LAST_TOKENS:] for layer in layers])
    ids_N, shares_N = head(rows_LTH.flatten(0, 1))
    width = rows_LTH.shape[1]
    said = words(ids_N.tolist())
    shares = shares_N.tolist()
    entered = in_words(residual.tokens(prompt.sequence_id)["token_id"][-_LAST_TOKENS:].tolist(), words)
    rows = (
        (str(layer), *(_cell(said[at], shares[at]) for at in range(place * width, (place + 1) * width)))
        for place, layer in enumerate(layers)
    )
    cut = f", its last {width} tokens" if prompt.num_rows > width else ""
    return table(f"Prompt {prompt.row_id}{cut}", ("layer", *entered), rows, "lens")


def _cell(word: str, share: float) -> Markup:
    step = sum(share >= each for each in _SURE)
    return Markup('<td class="s{}" title="{}">{}</td>').format(step, f"{share:.1%}", text(visible(word)))
