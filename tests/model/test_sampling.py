"""Each filter against its definition, and reproducibility."""

import pytest
import torch

from model.sampling import SamplingParams, sample


def logits_of(probabilities):
    return torch.tensor(probabilities).log()


def draws(logits, count=2000, **params):
    generator = torch.Generator().manual_seed(0)
    chosen = [sample(logits, SamplingParams(max_tokens=1, **params), generator) for _ in range(count)]
    return torch.bincount(torch.tensor(chosen), minlength=len(logits)) / count


def test_temperature_zero_takes_the_likeliest():
    assert sample(torch.tensor([0.1, 3.0, 2.9]), SamplingParams(1, temperature=0.0), torch.Generator()) == 1


def test_frequencies_follow_the_probabilities():
    frequencies = draws(logits_of([0.5, 0.3, 0.15, 0.05]))
    torch.testing.assert_close(frequencies, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)


def test_a_high_temperature_flattens():
    frequencies = draws(logits_of([0.9, 0.1]), temperature=2.0)
    expected = torch.tensor([0.9, 0.1]).sqrt()
    torch.testing.assert_close(frequencies, expected / expected.sum(), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.79}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"min_p": 0.5}, {0, 1}),
        ({"top_k": 3, "top_p": 0.6}, {0, 1}),  # of the three kept, 0.5/0.95 is not yet 0.6
        ({"top_p": 0.0}, {0}),
    ],
)
def test_filters_keep_exactly_what_they_promise(params, allowed):
    frequencies = draws(logits_of([0.5, 0.3, 0.15, 0.05]), **params)
    assert set(frequencies.nonzero().flatten().tolist()) == allowed


def test_a_seed_fixes_the_text():
    logits = torch.randn(1000)
    params = SamplingParams(1, seed=5)
    runs = [[sample(logits, params, torch.Generator().manual_seed(5)) for _ in range(3)] for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_flat_distribution_wider_than_the_candidates_is_sampled_whole():
    frequencies = draws(torch.zeros(20_000), count=300)
    assert (frequencies.nonzero() > 10_000).any()
