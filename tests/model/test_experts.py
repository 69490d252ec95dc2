"""Grouped dispatch against the plain definition, and which experts it runs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from model.blocks.base import ExpertUsage
from model.blocks.experts import ROW_MULTIPLE, SiluExperts, SwigluExperts, dispatch, padded_linear
from model.blocks.usage import MOST_WAITING

EXPERTS, WIDTH, HIDDEN = 8, 16, 32


def silu_expert(experts, expert, row):
    return experts.up_proj[expert] @ F.silu(experts.down_proj[expert] @ row)


def swiglu_expert(experts, expert, row):
    gate, up = experts.gate_proj[expert] @ row, experts.up_proj[expert] @ row
    return experts.down_proj[expert] @ (F.silu(gate) * up)


FORMS = [(SiluExperts, silu_expert), (SwigluExperts, swiglu_expert)]


def random_experts(form, num_experts=EXPERTS, hidden=HIDDEN, width=WIDTH):
    torch.manual_seed(3)
    experts = form(num_experts, hidden, width).requires_grad_(requires_grad=False)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


@pytest.mark.parametrize(("form", "one_expert"), FORMS)
def test_every_selection_gets_its_own_experts_output(form, one_expert):
    experts = random_experts(form)
    rows = torch.randn(13, HIDDEN)
    ids = torch.stack([torch.randperm(EXPERTS)[:3] for _ in range(13)])
    outputs = experts(rows, ids)
    for t in range(13):
        for k in range(3):
            assert_close(outputs[t, k], one_expert(experts, ids[t, k], rows[t]), atol=1e-3, rtol=1e-4)


def test_only_selected_experts_execute_and_only_on_their_rows():
    executed = {}

    def counting(expert, rows):
        assert expert not in executed, "an expert runs once, over all of its rows"
        assert len(rows) % ROW_MULTIPLE == 0
        executed[expert] = int(rows.any(dim=1).sum())  # rows that fill up are zero
        return rows

    ids = torch.tensor([[0, 5], [5, 2], [5, 0]])
    rows = torch.randn(3, HIDDEN)
    outputs = dispatch(rows, ids, EXPERTS, counting)
    assert executed == {0: 2, 2: 1, 5: 3}
    assert torch.equal(outputs, rows.unsqueeze(1).expand(3, 2, HIDDEN))


@pytest.mark.parametrize("form", [SiluExperts, SwigluExperts])
def test_fresh_experts_contribute_zero_and_count_what_one_token_passes_through(form):
    experts = form(EXPERTS, HIDDEN, WIDTH)
    assert not experts(torch.randn(5, HIDDEN), torch.randint(EXPERTS, (5, 2))).any()
    matrices = 2 if form is SiluExperts else 3
    assert experts.active_parameters(3) == 3 * matrices * HIDDEN * WIDTH


def test_experts_that_learn_after_a_measurement_are_measured_anew():
    experts = random_experts(SiluExperts).requires_grad_()
    rows, ids = torch.randn(4, HIDDEN), torch.randint(EXPERTS, (4, 2))
    with torch.inference_mode():
        before = experts(rows, ids)
    for parameter in experts.parameters():
        parameter.data = parameter.data * 2
    with torch.inference_mode():
        assert not torch.equal(experts(rows, ids), before)


@pytest.mark.parametrize("form", [SiluExperts, SwigluExperts])
@pytest.mark.parametrize("width", [16, 24, 152])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 11, 12])
def test_a_row_has_the_same_bits_whatever_the_row_count(form, width, count):
    experts = random_experts(form, num_experts=1, hidden=576, width=width)
    rows = torch.randn(64, 576)
    whole = experts(rows, torch.zeros(64, 1, dtype=torch.int64))
    assert torch.equal(experts(rows[:count], torch.zeros(count, 1, dtype=torch.int64)), whole[:count])
    weight = torch.randn(width, 576)
    assert torch.equal(padded_linear(rows[:count], weight), padded_linear(rows, weight)[:count])


@pytest.mark.parametrize("form", [SiluExperts, SwigluExperts])
def test_appended_experts_come_behind_and_leave_the_others_their_bits(form):
    experts, more = random_experts(form), random_experts(form, num_experts=3)
    rows, ids = torch.randn(13, HIDDEN), torch.randint(EXPERTS, (13, 2))
    before = experts(rows, ids)
    experts.append(more.stacked)
    assert experts.num_experts == EXPERTS + 3
    assert torch.equal(experts(rows, ids), before)
    new = torch.randint(3, (13, 2))
    assert torch.equal(experts(rows, EXPERTS + new), more(rows, new))
    assert experts.alignments(rows, rows).shape == (13, EXPERTS + 3)


def test_experts_that_a_reader_holds_stay_as_they_were():
    experts = random_experts(SiluExperts)
    held = experts.stacked
    experts.append(random_experts(SiluExperts, num_experts=2).stacked)
    assert [len(matrix) for matrix in held.values()] == [EXPERTS, EXPERTS]
    experts.adopt(held)
    assert experts.num_experts == EXPERTS
    assert len(experts.matrices()[0]) == EXPERTS, "nothing of the longer ones is remembered"


def test_growing_usage_keeps_every_count_and_every_array_that_was_read():
    usage = ExpertUsage([1, 2], 4, 2)
    usage.add((2,), np.array([[[0, 3]]]), decode=True)
    read = usage.counts
    usage.resize({2: 6})
    usage.add((2,), np.array([[[5, 3]]]), decode=True)
    assert usage.of_layer(2).tolist() == [[0] * 6, [1, 0, 0, 2, 0, 1]]
    assert usage.of_layer(1).shape == (2, 4)
    assert usage.counts.shape == (2, 2, 6)
    assert read[1, 1].tolist() == [1, 0, 0, 1]
    usage.resize({2: 4})
    assert usage.of_layer(2).tolist() == [[0] * 4, [1, 0, 0, 2]]


@pytest.mark.parametrize("looks", [set(), {0, 1}, {63, 64, 100}])
def test_usage_is_exact_whenever_somebody_looks(looks):
    usage, now = ExpertUsage([1, 2], 6, 2, lambda: now), 0.0
    expected, selected_at = np.zeros((2, 2, 6), np.int64), np.full(6, np.nan)
    rng = np.random.default_rng(0)
    for now in range(MOST_WAITING * 2 + 3):
        layers, decode = ((1, 2), True) if now % 5 else ((2,), False)
        ids = rng.random((len(layers), 1 + now % 3, 6)).argsort(axis=2)[..., :2]
        usage.add(layers, ids, decode=decode)
        for layer, selected in zip(layers, ids, strict=True):
            np.add.at(expected[int(decode), layer - 1], selected, 1)
        selected_at[ids[-1]] = now
        if now in looks:
            assert (usage.counts == expected).all()
            assert usage.recent[2].idle_s() == pytest.approx(now - selected_at, nan_ok=True)
    assert [usage.of_layer(layer).tolist() for layer in (1, 2)] == expected.swapaxes(0, 1).tolist()
    assert usage.recent[2].idle_s() == pytest.approx(now - selected_at, nan_ok=True)
    kept, tokens, _ = usage.recent[1].together_with(3)
    assert (kept, tokens) == (expected[1, 0].sum() // 2, expected[1, 0, 3])
