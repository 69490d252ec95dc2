"""Drawing many rows at once against drawing each by itself."""

import pytest
import torch

from model.graphs.drawing import draw, pays
from model.sampling import SamplingParams, sample, uniform

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", PLACES)
def test_rows_that_are_drawn_together_get_the_tokens_of_rows_alone(device):
    torch.manual_seed(5)
    logits = 4 * torch.randn(12, 200)
    temperatures = [0.0, 0.2, 1.0, 3.0] * 3

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(12)]

    alone = [
        sample(row, SamplingParams(1, temperature), generator)
        for row, temperature, generator in zip(logits, temperatures, generators(), strict=True)
    ]
    numbers = [uniform(g) for g in generators()]
    assert draw(logits.to(device), temperatures, numbers) == alone
    assert draw(logits.to(device), [0.0] * 12, [0.0] * 12) == logits.argmax(1).tolist()


@pytest.mark.parametrize("device", PLACES)
def test_a_row_that_is_not_finite_gets_no_token_and_spoils_no_other(device):
    logits = torch.zeros(4, 10)
    logits[:, 3] = 1.0
    logits[1, 5], logits[2, 6] = torch.nan, torch.inf
    assert draw(logits.to(device), [0.0] * 4, [0.0] * 4) == [3, -1, -1, 3]
    drawn = draw(logits.to(device), [1.0] * 4, [0.999999] * 4)
    assert drawn == [9, -1, -1, 9]
    assert pays(logits.to(device)) == (device == "cuda")
