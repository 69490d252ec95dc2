"""Flow-matching experts against the package mixture-of-flows, and their solvers against calculus."""

import math
from dataclasses import replace

import pytest
import torch
from mixture_of_flows import FlowMatchingMoE, FlowMatchingMoEConfig
from torch.testing import assert_close

from model.blocks.flow_experts import time_embedding, velocity
from model.blocks.fm_moe import FmMoeBlock, FmMoeConfig, flow_auxiliary_loss, load_reference
from model.blocks.solvers import SOLVERS, integrate, stage_times
from model.errors import UnsupportedConfig

EXPERTS, HIDDEN = 5, 24
CONFIG = FmMoeConfig(
    kind="fm-moe",
    layers=(0,),
    hidden_size=HIDDEN,
    num_experts=EXPERTS,
    num_experts_per_tok=2,
    expert_size=16,
    time_embed_size=8,
)
VELOCITY_PARTS = [
    "input_proj",
    "input_norm",
    "input_norm_bias",
    "hidden_proj",
    "hidden_bias",
    "hidden_norm",
    "hidden_norm_bias",
    "velocity_proj",
    "velocity_bias",
]


def pair(num_experts_per_tok=2, steps=10):
    """The reference with random weights everywhere, and our block with the same ones."""
    torch.manual_seed(6)
    reference = FlowMatchingMoE(
        FlowMatchingMoEConfig(
            input_dim=HIDDEN,
            hidden_dim=16,
            num_experts=EXPERTS,
            num_selected=num_experts_per_tok,
            flow_steps=steps,
            time_embed_dim=8,
        )
    )
    for parameter in reference.parameters():  # network.8 too: at zero every implementation agrees
        torch.nn.init.normal_(parameter, std=0.4)
    block = FmMoeBlock(replace(CONFIG, num_experts_per_tok=num_experts_per_tok, flow_steps=steps))
    load_reference(block, reference.state_dict())
    return reference.requires_grad_(requires_grad=False), block.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("num_experts_per_tok", [1, 2, EXPERTS])
def test_outputs_choices_losses_and_statistics_are_the_references(steps, num_experts_per_tok):
    reference, block = pair(num_experts_per_tok, steps)
    windows = torch.randn(2, 13, HIDDEN)
    rows = windows.flatten(0, 1)
    expected, expected_loss = reference.train()(windows)
    displacement, router_logits = block.displacement(rows, steps)
    assert displacement.abs().max() > 0.1
    assert_close(rows + displacement, expected.flatten(0, 1), atol=1e-5, rtol=0)
    gates, expert_ids, _ = block.route(rows)
    expected_gates, expected_ids, _ = reference.router(windows)
    assert torch.equal(expert_ids, expected_ids.flatten(0, 1))
    assert_close(gates, expected_gates.flatten(0, 1), atol=1e-6, rtol=0)
    assert_close(flow_auxiliary_loss(router_logits), expected_loss, atol=1e-7, rtol=1e-5)
    stats, expected_stats = block.usage_stats(rows), reference.get_expert_usage_stats(windows)
    assert set(expected_stats) == {"expert_probs", "expert_selections", "balance_score"}
    assert stats.expert_probs.numpy() == pytest.approx(expected_stats["expert_probs"], abs=1e-6)
    assert stats.expert_selections.tolist() == expected_stats["expert_selections"].tolist()
    assert stats.balance_score == pytest.approx(expected_stats["balance_score"], abs=1e-6)


def test_training_and_serving_see_the_references_experts_behind_the_norm():
    reference, block = pair(steps=4)
    windows = torch.randn(2, 8, HIDDEN)
    normed = block.normed(windows)
    contribution, loss = block(windows)
    expected, expected_loss = reference.train()(normed)
    assert_close(contribution, expected - normed, atol=1e-5, rtol=0)
    assert_close(loss, expected_loss, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("time", [0.0, 0.3, 1.0])
def test_the_folded_time_bias_equals_concatenating_the_time(time):
    reference, block = pair()
    rows = torch.randn(7, HIDDEN)
    embedded = time_embedding(time, 8, rows.device)
    assert_close(embedded, reference.experts[0].time_embed(torch.tensor(time))[0], atol=1e-6, rtol=0)
    for expert in range(EXPERTS):
        bias = block.experts.input_bias[expert] + block.experts.time_proj[expert] @ embedded
        own = [getattr(block.experts, name)[expert] for name in VELOCITY_PARTS]
        expected = reference.experts[expert](rows, torch.full((7,), time))
        assert_close(velocity(rows, bias, *own), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_each_solver_converges_at_its_order(solver, order):
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    exact = start * math.exp(-1.5)  # of dx/dt = -(1 + t) x

    def error(steps):
        end = integrate(SOLVERS[solver], lambda x, t: -(1 + t) * x, start, steps)
        return (end - exact).abs().max().item()

    assert math.log2(error(16) / error(32)) == pytest.approx(order, abs=0.2)


def test_euler_asks_for_the_velocity_at_left_points():
    asked = []

    def field(position, time):
        asked.append(time)
        return position * 0 + time

    end = integrate(SOLVERS["euler"], field, torch.zeros(1), 4)
    assert asked == [0.0, 0.25, 0.5, 0.75]
    assert end.item() == pytest.approx(0.375)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 3, 7, 10])
def test_every_time_that_is_asked_for_was_announced(solver, steps):
    announced = set(stage_times(SOLVERS[solver], steps))

    def field(position, time):
        assert time in announced
        return position

    integrate(SOLVERS[solver], field, torch.zeros(1), steps)


def test_a_better_solver_comes_closer_to_the_flow_that_training_means():
    _, block = pair()
    rows = torch.randn(16, HIDDEN)
    exact, _ = block.displacement(rows, 400)
    errors = {}
    for solver in SOLVERS:
        other = FmMoeBlock(replace(CONFIG, solver=solver))
        other.load_state_dict(block.state_dict())
        errors[solver] = (other.requires_grad_(requires_grad=False).displacement(rows, 8)[0] - exact).norm()
    assert errors["midpoint"] < errors["euler"]
    assert errors["heun"] < errors["euler"]
    assert errors["rk4"] < errors["euler"]


def test_an_unknown_solver_is_refused_by_name():
    with pytest.raises(UnsupportedConfig, match="'magic'; allowed: euler, heun, midpoint, rk4"):
        FmMoeBlock(replace(CONFIG, solver="magic"))


def test_each_request_gets_its_own_steps_in_one_batch(make_tiny):
    tiny = make_tiny(torch.float32, "fm-moe")
    prompt = [(5 * i) % 97 for i in range(9)]
    wishes = [1, 10, None, None, 4, 2]
    alone = [tiny.model.step([replace(tiny.segment(prompt), flow_steps=steps)]) for steps in wishes]
    together = tiny.model.step([replace(tiny.segment(prompt), flow_steps=steps) for steps in wishes])
    for rows, expected in zip(together.split(9), alone, strict=True):
        assert torch.equal(rows, expected)
    assert torch.equal(alone[2], alone[4]), "four steps are this variant's own"
    assert not torch.equal(alone[0], alone[1])


def test_experts_that_learn_after_a_measurement_are_measured_anew():
    _, block = pair(steps=2)
    block.requires_grad_()
    rows = torch.randn(8, HIDDEN)
    with torch.inference_mode():
        block.displacement(rows, 2)
    with torch.no_grad():
        block.experts.time_proj.mul_(-3)
    other = FmMoeBlock(block.config)
    other.load_state_dict(block.state_dict())
    with torch.inference_mode():
        assert torch.equal(block.displacement(rows, 2)[0], other.displacement(rows, 2)[0])


def test_weights_of_other_sizes_are_refused():
    reference, _ = pair()
    state = reference.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_reference(FmMoeBlock(replace(CONFIG, expert_size=24)), state)
    del state["experts.3.network.4.bias"]
    with pytest.raises(KeyError, match=r"experts\.3\.network\.4\.bias"):
        load_reference(FmMoeBlock(CONFIG), state)
