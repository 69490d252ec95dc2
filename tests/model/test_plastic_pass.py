"""The upper layers by themselves: the same numbers as serving, and gradients that autograd confirms."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from model.blocks.base import RoutingTrace
from model.credit import expert_credit
from model.head import NextTokenLoss
from model.plastic_pass import PlasticPass, UpperPast
from model.training.upper import run_layers

TEXT = torch.tensor([[(7 * i * i + 3 * i + j) % 97 for i in range(25)] for j in range(2)])
LAYERS = frozenset({1, 2})


@pytest.fixture
def upper(tiny) -> PlasticPass:
    return PlasticPass(tiny.model, tiny.blocks, LAYERS)


def anchors_of(tiny) -> dict[int, torch.Tensor]:
    return {layer: block.anchors.detach() for layer, block in tiny.blocks.items()}


def entry_of(tiny, row: int) -> tuple[torch.Tensor, RoutingTrace]:
    """The residual stream before the lowest block, as serving computes it."""
    trace = RoutingTrace(LAYERS)
    tiny.model.step([replace(tiny.segment(TEXT[row, :-1].tolist()), trace=trace)])
    assert trace.entry is not None
    return trace.entry, trace


def test_losses_and_routing_are_those_of_serving(tiny, upper):
    for row in range(2):
        entry, trace = entry_of(tiny, row)
        result = upper.run(entry[None], TEXT[row : row + 1, 1:], anchors_of(tiny))
        for layer in LAYERS:
            assert torch.equal(result.traces[layer].expert_ids, trace.by_layer[layer].expert_ids)
            assert_close(result.traces[layer].normed, trace.by_layer[layer].normed, atol=1e-5, rtol=1e-4)
        served = tiny.model.step([tiny.segment(TEXT[row, :-1].tolist())])
        expected = torch.nn.functional.cross_entropy(
            tiny.model.logits(served), TEXT[row, 1:], reduction="none"
        )
        assert_close(result.losses[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cut", [1, 8, 16])
def test_a_text_in_pieces_has_the_losses_of_the_whole(tiny, upper, cut):
    entry = torch.stack([entry_of(tiny, row)[0] for row in range(2)])
    whole = upper.run(entry, TEXT[:, 1:], anchors_of(tiny))
    past = UpperPast()
    pieces = [
        upper.run(entry[:, rows], TEXT[:, 1:][:, rows], anchors_of(tiny), past=past)
        for rows in (slice(cut), slice(cut, 24))
    ]
    assert past.length == 24
    assert_close(torch.cat([p.losses for p in pieces], 1), whole.losses, atol=1e-5, rtol=1e-4)


def test_credit_is_minus_the_derivative_of_the_loss_by_the_selected_scores(tiny, upper):
    """The defining property, through every layer above: keys get exactly the credit-weighted queries."""
    entry = torch.stack([entry_of(tiny, row)[0] for row in range(2)])
    keys = anchors_of(tiny)
    result = upper.run(entry, TEXT[:, 1:], keys, credit="gradient")
    for layer in sorted(LAYERS):
        trace = result.traces[layer]
        credit = expert_credit(tiny.blocks[layer], keys[layer], trace, result.gradients[layer], 2)
        weights = torch.zeros(len(trace.queries), len(keys[layer])).scatter_(
            1, credit.expert_ids, credit.values
        )
        by_keys = -(weights.T @ trace.queries)  # d loss / d k_i = -sum_t c_ti q_t
        moved = {each: rows.clone().requires_grad_(each == layer) for each, rows in keys.items()}
        loss = loss_by_keys(tiny, entry, moved)
        (expected,) = torch.autograd.grad(loss, [moved[layer]])
        assert_close(by_keys, expected, atol=1e-4, rtol=1e-3)


def loss_by_keys(tiny, entry, keys):
    """Written apart from the pass: blocks and layers composed by hand, everything differentiable."""
    hidden = entry + tiny.blocks[1].mix(tiny.blocks[1].normed(entry), keys[1]).combined
    hidden = run_layers(tiny.model, hidden, 2, 3)
    hidden = hidden + tiny.blocks[2].mix(tiny.blocks[2].normed(hidden), keys[2]).combined
    model = tiny.model
    return NextTokenLoss.apply(
        hidden.flatten(0, 1),
        model.final_norm,
        model.config.rms_norm_eps,
        model.embedding,
        TEXT[:, 1:].flatten(),
    ).sum()


def test_texts_beside_each_other_may_have_keys_of_their_own(tiny, upper):
    entry = torch.stack([entry_of(tiny, row)[0] for row in range(2)])
    moved = {layer: rows.flip(0) for layer, rows in anchors_of(tiny).items()}
    both = {layer: torch.stack((rows, moved[layer])) for layer, rows in anchors_of(tiny).items()}
    together = upper.run(entry, TEXT[:, 1:], both).losses
    alone = upper.run(entry[1:], TEXT[1:, 1:], moved).losses
    assert_close(together[1:], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[:1], upper.run(entry[:1], TEXT[:1, 1:], moved).losses)
