"""The differentiable law of bench/plastic_training.py moves keys and offsets as the server's own does."""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))  # its files are scripts and import each other

from plastic_law import LayerState, learn

from keystore.records import GravityConfig
from model.blocks.some import SomeBlock, SomeConfig
from model.value_offsets import updated
from server.crediting import credited_rows
from server.stream.learner import KeyLearner
from server.stream.rules import VALUE_BOUND

SESSIONS, TOKENS, WINDOWS, RATE = 2, 32, 4, 0.015
GRAVITY = GravityConfig(rule="direct", plasticity_rate=1.0, trust_radius=0.2, credit_candidates=6)


def a_block() -> SomeBlock:
    torch.manual_seed(0)
    block = SomeBlock(
        SomeConfig(
            kind="some",
            layers=(0,),
            hidden_size=24,
            num_experts=12,
            num_experts_per_tok=3,
            expert_size=8,
            key_size=8,
        )
    )
    for parameter in block.experts.parameters():  # experts begin at zero, which would earn no credit
        parameter.data += 0.3 * torch.randn_like(parameter)
    return block


def test_keys_and_offsets_move_as_they_do_in_the_server() -> None:
    block = a_block().requires_grad_(requires_grad=False)
    anchors = {0: block.anchors.numpy()}
    learners = [KeyLearner(anchors, frozenset({0}), GRAVITY, 3) for _ in range(SESSIONS)]
    offsets = torch.zeros(SESSIONS, 12, 24)
    state = LayerState.at_anchors(block, SESSIONS)
    for window in range(WINDOWS):
        torch.manual_seed(10 + window)
        hidden, gradient = torch.randn(SESSIONS, TOKENS, 24), 0.1 * torch.randn(SESSIONS * TOKENS, 24)
        wanted = 3 * gradient.roll(1, dims=1)  # any directions
        mixture = block.mix(block.normed(hidden), state.keys, state.offsets)
        norms = (hidden + mixture.combined).norm(dim=-1)
        for text, learner in enumerate(learners):
            rows = slice(text * TOKENS, (text + 1) * TOKENS)
            trace, keys = mixture.trace.cut(rows), torch.from_numpy(learner.keys[0])
            learner.learn({0: credited_rows(block, keys, trace, gradient[rows], GRAVITY.credit_candidates)})
        shape = (SESSIONS, TOKENS)
        offsets = updated(
            offsets, mixture.trace.expert_ids.unflatten(0, shape), mixture.trace.gates.unflatten(0, shape),
            wanted.unflatten(0, shape), norms, RATE, VALUE_BOUND,
        )  # fmt: skip
        state = learn(state, block, mixture.trace, gradient, wanted, norms, GRAVITY, RATE)
        assert state.offsets is not None
        torch.testing.assert_close(state.offsets, offsets, rtol=1e-5, atol=1e-7)
        for text, learner in enumerate(learners):
            np.testing.assert_allclose(state.keys[text].numpy(), learner.keys[0], rtol=1e-4, atol=2e-6)
    moved = np.linalg.norm(learners[0].keys[0] - anchors[0], axis=1) / np.linalg.norm(anchors[0], axis=1)
    assert moved.max() > 0.19, "some keys reach the trust radius, so that the bound was compared too"


def test_the_derivative_goes_through_the_update() -> None:
    block = a_block()
    torch.manual_seed(5)
    hidden, gradient = torch.randn(1, TOKENS, 24), 0.1 * torch.randn(TOKENS, 24)
    mixture = block.mix(block.normed(hidden), block.anchors)
    state = learn(
        LayerState.at_anchors(block, 1), block, mixture.trace, gradient, gradient,
        (hidden + mixture.combined).detach().norm(dim=-1), GRAVITY, RATE,
    )  # fmt: skip
    assert state.offsets is not None
    moved = (state.keys - block.anchors).square().sum() + state.offsets.square().sum()
    assert block.query_proj is not None
    by_query, *by_experts = torch.autograd.grad(moved, [block.query_proj, *block.experts.parameters()])
    assert by_query.abs().max() > 0
    assert all(each.abs().max() > 0 for each in by_experts)
