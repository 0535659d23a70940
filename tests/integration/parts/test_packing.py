"""Examples packed behind one shared prefix are computed as if each were alone."""

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deployments.reference_fleet.training.packing import Encoded, pack

PREFIX = [1, 2, 3]
EXAMPLES = [
    Encoded([10, 11, 12, 13], prompt=2, shares_prefix=True),
    Encoded([20, 21, 22], prompt=2, shares_prefix=False),
    Encoded([30, 31, 32, 33, 34], prompt=3, shares_prefix=True),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()


@pytest.mark.usefixtures("without_gradients")
def test_a_packed_example_has_the_logits_that_it_has_alone(model: LlamaForCausalLM) -> None:
    row = pack(PREFIX, EXAMPLES)
    packed = model(input_ids=row.ids, position_ids=row.positions, attention_mask=row.mask).logits[0]
    begin = len(PREFIX)
    for example in EXAMPLES:
        before = PREFIX if example.shares_prefix else []
        alone = model(input_ids=torch.tensor([before + example.ids])).logits[0, len(before) :]
        torch.testing.assert_close(packed[begin : begin + len(example.ids)], alone)
        begin += len(example.ids)


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_the_targets_are_the_answers_and_nothing_else() -> None:
    row = pack(PREFIX, EXAMPLES)
    targets = [t for t in row.targets.tolist() if t >= 0]
    assert targets == [12, 13, 22, 33, 34]
    # Each target stands where the token before it is read.
    read = [row.ids[0, i + 1].item() for i, t in enumerate(row.targets.tolist()) if t >= 0]
    assert read == targets
