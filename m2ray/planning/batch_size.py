"""`batch_tokens = "auto"`: the size of micro-batches that takes least time where memory has room for it.

What micro-batches cost was measured once and stands here: nothing is measured when a run starts, so that the same command gives the same
micro-batches everywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from m2ray.batches import PromptStats

AUTO_BATCH_TOKENS = 32_768
"""No larger one is chosen: each of MiniMax-M2's 256 experts then sees 1,024 tokens on average, and little of a micro-batch's time is fixed."""

MOST_ON_CPU = 16_384


@dataclass(frozen=True)
class Costs:
    """What micro-batches cost on a kind of device, in the time of one padded token of a micro-batch of the best size.

    Attributes:
        fixed_tokens: each one's besides its tokens.
        least_tokens: no smaller size is chosen.
        ready_tokens: where memory leaves less than this beside weights that lie ready, it is better that they do not.
        token: a token's, from a size on; of sizes below the first, as there.
    """

    fixed_tokens: int
    least_tokens: int
    ready_tokens: int
    token: Mapping[int, float]

    def of(self, prompts: PromptStats, size: int) -> float:
        """All micro-batches of at most `size` padded tokens."""
        token = [cost for least, cost in self.token.items() if least <= size]
        return prompts.padded_tokens * (token[-1] if token else 1.0) + self.fixed_tokens * prompts.micro_batches


ON_GPU = Costs(fixed_tokens=1_700, least_tokens=2_048, ready_tokens=8_192, token={})
"""One H200: 2,048 tokens of a layer of MiniMax-M2 take 4.7 ms, 16,384 take 22.8 ms."""

ON_CPU = Costs(fixed_tokens=50, least_tokens=256, ready_tokens=256, token={256: 1.0, 2_048: 1.1, 4_096: 1.15, 8_192: 1.3, 16_384: 1.4})
"""SmolLM2-135M, 2 CPU cores without a GPU, torch 2.13, float32, 29 November 2026, sequences of 256 tokens: 1 ms a token at 256, 0.96 at 512,
0.93 at 1,024, 1.12 at 2,048, 1.19 at 4,096, 1.39 at 8,192, where activations no longer fit the caches; sequences of 64: 1.5 at 64, 1.19 at 128,
1.13 at 512. In bfloat16 a token takes 1.5 to 1.6 at every size from 256 on. So 40 tokens of each micro-batch's time are
fixed; 10 more, by estimate, are what m2ray does of each on the same cores: the driver's calls (3 to 4 ms, benchmarks/results/driver_cost.json) and a row group a
layer."""


def best_batch_tokens(
    most_tokens: int, stats_at: Callable[[int], PromptStats], num_stages: int, replicas: int = 1, costs: Costs = ON_GPU
) -> int:
    """The quickest of `most_tokens`, its half, its quarter and so on down to the least of `costs`; of equal ones the largest.

    A smaller micro-batch pads less and fills the chain sooner, and pays more often what each costs. Hence many prompts get the largest,
    and a few prompts over many stages a smaller one.

    Args:
        most_tokens: what memory has room for.
        stats_at: from the padded tokens of a micro-batch to what the prompts come to in such micro-batches.
        num_stages: of a chain.
        replicas: chains that share the prompts.
        costs: of the devices that compute.
    """
    sizes = [most_tokens]
    while sizes[-1] // 2 >= costs.least_tokens:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda size: _chain_tokens(costs.of(stats_at(size), size), stats_at(size).micro_batches, num_stages, replicas))


def _chain_tokens(all_tokens: float, micro_batches: int, num_stages: int, replicas: int) -> float:
    """Time in tokens of one stage: S stages need M + S - 1 steps for M micro-batches."""
    return all_tokens / replicas * (1 + (num_stages - 1) * replicas / max(1, micro_batches))
