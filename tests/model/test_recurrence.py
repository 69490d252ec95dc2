"""Decaying sums against the loop they stand for."""

import pytest
import torch
from torch.testing import assert_close

from model.recurrence import SequenceRows, WholeWindows, decayed_sums

CHANNELS = 32


def one_after_the_other(values, decay, initial):
    state, sums = initial, []
    for row in values.unbind(-2):
        state = decay * state + row
        sums.append(state)
    return torch.stack(sums, dim=-2)


@pytest.fixture
def decay():
    return torch.linspace(0.05, 1.0, CHANNELS)


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_all_positions_at_once_equal_one_after_the_other(decay, length):
    torch.manual_seed(0)
    values, initial = torch.randn(2, length, CHANNELS), torch.randn(2, CHANNELS)
    expected = one_after_the_other(values, decay, initial)
    assert_close(decayed_sums(values, decay, initial), expected, atol=1e-5, rtol=1e-5)
    shared = torch.tensor([0.9])
    expected = one_after_the_other(values, shared, initial)
    assert_close(decayed_sums(values, shared, initial), expected, atol=1e-5, rtol=1e-5)


def test_decay_one_is_a_cumulative_sum():
    values = torch.randn(50, CHANNELS)
    sums = decayed_sums(values, torch.ones(1), torch.zeros(CHANNELS))
    assert_close(sums, values.cumsum(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("known", [1, 5, 37, 64])
def test_what_follows_a_position_does_not_touch_its_bits(decay, known):
    torch.manual_seed(0)
    values, initial = torch.randn(100, CHANNELS), torch.randn(CHANNELS)
    for each in (decay, torch.tensor([0.97])):
        whole = decayed_sums(values, each, initial)
        assert torch.equal(decayed_sums(values[:known], each, initial), whole[:known])


@pytest.mark.parametrize("decay", [0.999, 0.9999, 1.0])
def test_long_texts_stay_exact_with_a_decay_near_one(decay):
    torch.manual_seed(0)
    values, initial = torch.randn(4096, 4) + 1.0, torch.randn(4)
    expected = one_after_the_other(values.double(), torch.tensor([decay]).double(), initial.double())
    sums = decayed_sums(values, torch.tensor([decay]), initial)
    assert_close(sums.double(), expected, atol=1e-3, rtol=1e-4)


def test_gradients_are_those_of_the_loop():
    torch.manual_seed(0)
    values, initial = torch.randn(9, CHANNELS), torch.randn(CHANNELS)
    gradients = []
    for sums in (decayed_sums, one_after_the_other):
        inputs = [t.clone().requires_grad_() for t in (values, torch.linspace(0.1, 0.9, CHANNELS), initial)]
        sums(*inputs).square().sum().backward()
        gradients.append([each.grad for each in inputs])
    assert_close(*gradients, atol=1e-3, rtol=1e-4)


def test_each_sequence_goes_on_from_its_own_state(decay):
    torch.manual_seed(0)
    first, second = torch.randn(9, CHANNELS), torch.randn(14, CHANNELS)
    fresh = torch.zeros(2, CHANNELS)
    memory = SequenceRows([fresh, fresh], [4, 13])
    start = memory.run(1, torch.cat((first[:4], second[:13])), decay)
    later = SequenceRows(memory.states, [5, 1])
    rest = later.run(1, torch.cat((first[4:], second[13:])), decay)
    whole = WholeWindows()
    expected = whole.run(1, first.unsqueeze(0), decay)[0]
    assert_close(torch.cat((start[:4], rest[:5])), expected, atol=1e-5, rtol=1e-5)
    expected = whole.run(1, second.unsqueeze(0), decay)[0]
    assert_close(torch.cat((start[4:], rest[5:])), expected, atol=1e-5, rtol=1e-5)
    assert not fresh.any(), "a state that was handed in belongs to whoever handed it in"
    assert not later.states[0][0].any(), "the other recurrence did not run"
