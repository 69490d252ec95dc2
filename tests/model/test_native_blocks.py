"""Compiled blocks of written rows: what torch computes, each row the same beside any others."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from model.blocks import build_block
from model.blocks.base import BlockSpan, ExpertUsage
from model.blocks.fm_moe import FmMoeConfig
from model.blocks.mom import MomConfig
from model.blocks.solvers import SOLVERS

HIDDEN, SEQUENCES, STEPS = 32, 5, 3
SIZES = {"layers": (0,), "hidden_size": HIDDEN, "num_experts_per_tok": 2}
MOM = MomConfig(kind="mom", **SIZES, num_experts=5, expert_size=24)
FM_MOE = FmMoeConfig(kind="fm-moe", **SIZES, num_experts=4, expert_size=16, time_embed_size=8)


def trained(config):
    torch.manual_seed(3)
    block = build_block(config).requires_grad_(requires_grad=False)
    for parameter in block.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return block


def texts():
    return torch.randn(SEQUENCES, 7 + STEPS, HIDDEN, generator=torch.Generator().manual_seed(4))


@torch.inference_mode()
def served(block, rows, start, states, *, decode, usage=None, **options):
    """Rows (n, length, H) of n sequences, whose states go on -> (n, length, H)."""
    length = rows.shape[1]
    spans = [
        BlockSpan(i * length, (i + 1) * length, start, None, None, decode, state, **options)
        for i, state in enumerate(states)
    ]
    usage = usage or ExpertUsage.of(block.config)
    return block.serve(rows.flatten(0, 1), 0, spans, usage).view_as(rows)


def written(block, members, **options):
    """STEPS tokens of some sequences behind 7 that were read: (n, STEPS, H), the states, and what was counted."""
    rows, states = texts()[members], [{} for _ in members]
    served(block, rows[:, :7], 0, states, decode=False)
    usage = ExpertUsage.of(block.config)
    parts = [
        served(block, rows[:, i : i + 1].contiguous(), i, states, decode=True, usage=usage, **options)
        for i in range(7, 7 + STEPS)
    ]
    return torch.cat(parts, dim=1), states, usage.counts


def agrees(block, **options):
    everybody = list(range(SEQUENCES))
    found, states, counts = written(block, everybody, **options)
    expected_states = [{} for _ in everybody]
    rows = texts()
    served(block, rows[:, :7], 0, expected_states, decode=False)
    usage = ExpertUsage.of(block.config)
    expected = torch.cat(
        [
            served(block, rows[:, i : i + 1], i, expected_states, decode=False, usage=usage, **options)
            for i in range(7, 7 + STEPS)
        ],
        dim=1,
    )
    assert expected.abs().max() > 0.1
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (counts[1] == usage.counts[0]).all()
    for state, wanted in zip(states, expected_states, strict=True):
        assert state.keys() == wanted.keys()
        for layer in wanted:
            assert_close(state[layer], wanted[layer], atol=1e-5, rtol=1e-4)
    for member in everybody:
        alone, own_states, _ = written(block, [member], **options)
        assert torch.equal(alone[0], found[member])
        assert all(torch.equal(own, states[member][layer]) for layer, own in own_states[0].items())
    return found


@pytest.mark.parametrize("routing", ["soft", "topk", "hybrid"])
@pytest.mark.parametrize("flow", ["mean", "sum"])
@pytest.mark.parametrize("temperature", ["softplus", "sigmoid"])
@pytest.mark.parametrize("attention", ["none", "flow"])
def test_masters_of_written_rows_give_what_torch_gives(routing, flow, temperature, attention):
    choices = {"routing": routing, "flow": flow, "temperature": temperature, "attention": attention}
    block = trained(replace(MOM, **choices, bypass_threshold=0.5))
    block.temperature_bias.fill_(0.2)
    block.temperature_proj.normal_()
    found = agrees(block)
    passing = (found == 0).all(-1)
    assert 0 < passing.sum() < passing.numel(), "some tokens pass by, some do not"


def test_a_state_that_was_kept_stays_as_it_was():
    block, states = trained(MOM), [{}]
    rows = texts()[:1]
    served(block, rows[:, :7], 0, states, decode=False)
    kept, before = states[0][0], states[0][0].clone()
    served(block, rows[:, 7:8].contiguous(), 7, states, decode=True)
    assert torch.equal(kept, before)
    assert not torch.equal(states[0][0], before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_reach_a_neighbour(value):
    block = trained(MOM)
    rows = texts()[:3, :1].contiguous()
    clean = served(block, rows, 0, [{}, {}, {}], decode=True)
    rows[1, 0, 4] = value
    strange = served(block, rows, 0, [{}, {}, {}], decode=True)
    assert torch.equal(strange[0], clean[0])
    assert torch.equal(strange[2], clean[2])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("flow_steps", [None, 3])
def test_flows_of_written_rows_give_what_torch_gives(solver, flow_steps):
    agrees(trained(replace(FM_MOE, solver=solver)), flow_steps=flow_steps)
