"""Each filter against its definition, and reproducibility."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling import SamplingParams, adjust, sample


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


def naive_adjust(logits, params, prompt, generated, eos):
    """Each rule spelled out, in vLLM's order."""
    logits = logits.tolist()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if len(generated) < params.min_tokens:
        for token in {*params.stop_token_ids, *(() if params.ignore_eos else (eos,))}:
            logits[token] = float("-inf")
    for token in {*prompt, *generated}:
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(generated):
        logits[token] -= params.presence_penalty + params.frequency_penalty * generated.count(token)
    return torch.tensor(logits)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, 19), min_size=1, max_size=8),
    generated=st.lists(st.integers(0, 19), max_size=8),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.01, 10),
    bias=st.dictionaries(st.integers(0, 19), st.floats(-100, 100), max_size=4),
    least=st.integers(0, 8),
    stop=st.frozensets(st.integers(0, 19), max_size=3),
    ignore_eos=st.booleans(),
)
def test_adjusted_logits_equal_the_rules_spelled_out(
    seed, prompt, generated, presence, frequency, repetition, bias, least, stop, ignore_eos
):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(seed)) * 5
    before = logits.clone()
    params = SamplingParams(
        8,
        stop_token_ids=stop,
        ignore_eos=ignore_eos,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=bias,
        min_tokens=least,
    )
    adjusted = adjust(logits, params, torch.tensor(prompt), generated, 7)
    assert adjusted.dtype == torch.float32
    torch.testing.assert_close(
        adjusted, naive_adjust(logits, params, prompt, generated, 7), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.01},
        {"logit_bias": {3: 0.5}},
        {"min_tokens": 1},
    ],
)
def test_each_rule_alone_asks_for_an_adjustment(fields):
    assert SamplingParams(1, **fields).adjusted
    assert not SamplingParams(1).adjusted


def test_a_masked_token_is_never_drawn():
    params = SamplingParams(1, min_tokens=2, stop_token_ids=frozenset([0]), ignore_eos=True)
    adjusted = adjust(logits_of([0.9, 0.06, 0.04]), params, torch.tensor([1]), [], 0)
    frequencies = draws(adjusted, count=300)
    assert frequencies[0] == 0
