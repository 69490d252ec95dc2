"""Grouped dispatch against the plain definition, and which experts it runs."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from model.blocks import experts

EXPERTS, WIDTH, HIDDEN = 8, 16, 32


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator)
    return down, torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)


def test_every_selection_gets_its_own_experts_output(weights):
    down, up = weights
    rows = torch.randn(13, HIDDEN)
    ids = torch.stack([torch.randperm(EXPERTS)[:3] for _ in range(13)])
    outputs = experts.run_experts(rows, ids, down.unbind(), up.unbind())
    for t in range(13):
        for k in range(3):
            expected = up[ids[t, k]] @ F.silu(down[ids[t, k]] @ rows[t])
            assert_close(outputs[t, k], expected, atol=1e-4, rtol=1e-4)


def test_only_selected_experts_execute_and_only_on_their_rows(weights, monkeypatch):
    down, up = weights
    executed = {}
    original = experts.run_expert

    def counting(rows, down_proj, up_proj):
        expert = next(e for e in range(EXPERTS) if down_proj.data_ptr() == down[e].data_ptr())
        assert expert not in executed, "an expert runs once, over all of its rows"
        executed[expert] = len(rows)
        return original(rows, down_proj, up_proj)

    monkeypatch.setattr(experts, "run_expert", counting)
    ids = torch.tensor([[0, 5], [5, 2], [5, 0]])
    experts.run_experts(torch.randn(3, HIDDEN), ids, down.unbind(), up.unbind())
    assert executed == {0: 2, 2: 1, 5: 3}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 11, 12])
def test_a_row_has_the_same_bits_whatever_the_row_count(count):
    generator = torch.Generator().manual_seed(count)
    down = torch.randn(24, 576, generator=generator)
    up = torch.randn(576, 24, generator=generator)
    rows = torch.randn(64, 576, generator=generator)
    whole = experts.run_expert(rows, down, up)
    assert torch.equal(experts.run_expert(rows[:count], down, up), whole[:count])
    assert torch.equal(experts.padded_linear(rows[:count], down), experts.padded_linear(rows, down)[:count])
