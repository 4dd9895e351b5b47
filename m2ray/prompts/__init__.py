"""From a prompt source to shards of token ids: read, tokenise, quarantine, cut, batch."""

from m2ray.prompts.requested import RequestedPrompts
from m2ray.prompts.resume import load_shards, respool
from m2ray.prompts.rows import PromptRow
from m2ray.prompts.shards import ShardTable, batching, estimated_batching, micro_batches
from m2ray.prompts.sources import PromptSource
from m2ray.prompts.spool import TokenSpool
from m2ray.prompts.surveying import Survey, survey
from m2ray.prompts.tokenize import PromptTokenizer

__all__ = [
    "PromptRow",
    "PromptSource",
    "PromptTokenizer",
    "RequestedPrompts",
    "ShardTable",
    "Survey",
    "TokenSpool",
    "batching",
    "estimated_batching",
    "load_shards",
    "micro_batches",
    "respool",
    "survey",
]
