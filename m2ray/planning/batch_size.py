"""`batch_tokens = "auto"`: the size of micro-batches that takes least time where memory has room for it."""

from collections.abc import Callable

from m2ray.batches import PromptStats

AUTO_BATCH_TOKENS = 16_384
"""No larger one is chosen: each of MiniMax-M2's 256 experts then sees 512 tokens on average, and little of a micro-batch's time is fixed."""

_LEAST_TOKENS = 2_048

FIXED_TOKENS = 1_700
"""What every micro-batch costs besides its tokens, in tokens: on an H200 2,048 tokens of a layer take 4.7 ms, 16,384 take 22.8 ms."""


def best_batch_tokens(most_tokens: int, stats_at: Callable[[int], PromptStats], num_stages: int, replicas: int = 1) -> int:
    """The quickest of `most_tokens`, its half, its quarter and so on down to 2,048; of equal ones the largest.

    A smaller micro-batch pads less and fills the chain sooner, and pays more often what each costs. Hence many prompts get the largest,
    and a few prompts over many stages a smaller one.

    Args:
        most_tokens: what memory has room for.
        stats_at: from the padded tokens of a micro-batch to what the prompts come to in such micro-batches.
        num_stages: of a chain.
        replicas: chains that share the prompts.
    """
    sizes = [most_tokens]
    while sizes[-1] // 2 >= _LEAST_TOKENS:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda size: _steps_tokens(stats_at(size), num_stages, replicas))


def _steps_tokens(prompts: PromptStats, num_stages: int, replicas: int) -> float:
    """Time in tokens of one stage: S stages need M + S - 1 steps for M micro-batches."""
    all_tokens = (prompts.padded_tokens + FIXED_TOKENS * prompts.micro_batches) / replicas
    return all_tokens * (1 + (num_stages - 1) * replicas / max(1, prompts.micro_batches))
