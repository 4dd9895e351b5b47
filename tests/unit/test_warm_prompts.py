"""What `WarmChain.activations` takes prompts for."""

from typing import Any

import pytest
import torch

from m2ray.api.connecting import _name_of
from m2ray.errors import PromptsError


@pytest.mark.parametrize(
    ("prompts", "name"),
    [
        (["sea"], "prompts"),
        ([[{"role": "user", "content": "sea"}]], "messages"),
        ([{"role": "user", "content": "sea"}], "messages"),  # refused as one, with what is wrong with it
        ([[1, 2]], "input_ids"),
        (torch.tensor([[1, 2]]), "input_ids"),
        ([1, 2], "input_ids"),
        (torch.tensor([1, 2]), "input_ids"),
        ([None], "input_ids"),
        ([], "prompts"),
    ],
)
def test_they_are_called_by_what_the_first_is(prompts: Any, name: str) -> None:
    assert _name_of(prompts) == name


@pytest.mark.parametrize("prompt", ["The capital of France is", b"sea", {"role": "user"}])
def test_one_prompt_alone_is_no_list_of_its_letters(prompt: Any) -> None:
    with pytest.raises(PromptsError, match="list of one"):
        _name_of(prompt)
