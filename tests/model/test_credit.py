"""Credit is a derivative: autograd is the reference."""

import pytest
import torch
from torch.testing import assert_close

from model.blocks import build_block
from model.blocks.base import LayerTrace
from model.blocks.some import SomeBlock, SomeConfig
from model.credit import expert_credit, loss_gradient
from model.head import NextTokenLoss, loss_and_gradient

TOKENS, HIDDEN, EXPERTS, SELECTED = 6, 32, 8, 3


@pytest.fixture(params=["silu", "swiglu"])
def block(request) -> SomeBlock:
    torch.manual_seed(0)
    made = build_block(
        SomeConfig(
            kind="some",
            layers=(2,),
            hidden_size=HIDDEN,
            num_experts=EXPERTS,
            num_experts_per_tok=SELECTED,
            expert_size=8,
            key_size=16,
            expert_form=request.param,
        )
    )
    for parameter in made.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made.requires_grad_(False)


def loss_of_scores(model, block, normed, scores, chosen, targets) -> torch.Tensor:
    """Summed loss of the residual stream `normed` plus what the chosen experts add, mixed by `scores`."""
    outputs = block.experts(normed, chosen)
    final = normed + (scores.gather(1, chosen).softmax(-1).unsqueeze(-1) * outputs).sum(1)
    rows = torch.nn.functional.rms_norm(final, (HIDDEN,), model.final_norm, 1e-5)
    return torch.nn.functional.cross_entropy(rows @ model.embedding.T, targets, reduction="none").sum()


def credit_at_the_last_layer(model, block, normed, keys, targets, **options):
    mixture = block.mix(normed[None], keys)
    gradient = loss_gradient(model, (normed + mixture.combined[0]), targets)
    return mixture, gradient, expert_credit(block, keys, mixture.trace, gradient, **options)


def case(block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(TOKENS, HIDDEN), torch.randn(EXPERTS, 16), torch.randint(0, 97, (TOKENS,))


def test_the_heads_gradient_equals_autograds(tiny):
    model = tiny.model
    torch.manual_seed(0)
    hidden = torch.randn(9, 32, requires_grad=True)
    norm = torch.rand(32) + 0.5
    targets = torch.randint(0, 97, (9,))
    normed = torch.nn.functional.rms_norm(hidden, (32,), norm, 1e-5)
    expected = torch.nn.functional.cross_entropy(normed @ model.embedding.T, targets, reduction="none")
    expected.sum().backward()
    losses, gradient = loss_and_gradient(hidden.detach(), norm, 1e-5, model.embedding, targets)
    assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-5)
    assert_close(gradient, hidden.grad, atol=1e-5, rtol=1e-4)
    again = hidden.detach().clone().requires_grad_()
    (NextTokenLoss.apply(again, norm, 1e-5, model.embedding, targets) * torch.arange(9.0)).sum().backward()
    assert_close(again.grad, hidden.grad * torch.arange(9.0).unsqueeze(1), atol=1e-5, rtol=1e-4)


def test_selected_experts_credit_is_minus_the_derivative_by_their_scores(tiny, block):
    normed, keys, targets = case(block)
    mixture, _, credit = credit_at_the_last_layer(
        tiny.model, block, normed, keys, targets, candidates=SELECTED
    )
    scores = mixture.all_scores[0].clone().requires_grad_()
    chosen = mixture.trace.expert_ids
    loss_of_scores(tiny.model, block, normed, scores, chosen, targets).backward()
    assert torch.equal(credit.expert_ids.sort(1).values, chosen.sort(1).values)
    assert_close(credit.values, -scores.grad.gather(1, credit.expert_ids), atol=1e-5, rtol=1e-4)


def test_a_candidates_credit_is_what_it_would_have_had_beside_the_selected(tiny, block):
    """To first order in the output: G is taken where the block's output is, before the candidate joined."""
    normed, keys, targets = case(block)
    mixture, gradient, credit = credit_at_the_last_layer(
        tiny.model, block, normed, keys, targets, candidates=0
    )
    assert credit.expert_ids.shape == (TOKENS, EXPERTS)
    for token in range(TOKENS):
        selected = mixture.trace.expert_ids[token]
        for expert in sorted(set(range(EXPERTS)) - set(selected.tolist())):
            scores = mixture.all_scores[0, token].clone().requires_grad_()
            joined = torch.cat((selected, torch.tensor([expert])))
            outputs = block.experts(normed[token : token + 1], joined[None])[0]
            mixed = scores[joined].softmax(-1) @ outputs
            (mixed @ gradient[token].clone()).backward()
            got = credit.values[token, credit.expert_ids[token] == expert]
            assert_close(got[0], -scores.grad[expert], atol=1e-5, rtol=1e-4)


def test_candidates_are_the_best_after_the_selected_and_never_hidden_ones(tiny, block):
    normed, keys, targets = case(block)
    mixture, gradient, _ = credit_at_the_last_layer(tiny.model, block, normed, keys, targets, candidates=0)
    never_selected = next(e for e in range(EXPERTS) if not (mixture.trace.expert_ids == e).any())
    visible_ids = torch.tensor([e for e in range(EXPERTS) if e != never_selected])
    credit = expert_credit(block, keys, mixture.trace, gradient, 5, visible_ids)
    assert credit.expert_ids.shape == (TOKENS, 5)
    assert not (credit.expert_ids == never_selected).any()
    assert torch.equal(
        credit.expert_ids[:, :SELECTED].sort(1).values, mixture.trace.expert_ids.sort(1).values
    )
    everything = expert_credit(block, keys, mixture.trace, gradient, 0, visible_ids)
    assert everything.expert_ids.shape == (TOKENS, EXPERTS - 1)


def test_alignments_are_the_products_with_every_experts_output(block):
    torch.manual_seed(2)
    rows, directions = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)
    everyone = torch.arange(EXPERTS).expand(5, -1)
    expected = torch.einsum("teh,th->te", block.experts(rows, everyone), directions)
    assert_close(block.experts.alignments(rows, directions), expected, atol=1e-5, rtol=1e-4)


def test_credit_of_fewer_rows_than_the_trace_ignores_the_rest(tiny, block):
    normed, keys, targets = case(block)
    mixture, gradient, credit = credit_at_the_last_layer(
        tiny.model, block, normed, keys, targets, candidates=0
    )
    fewer = expert_credit(block, keys, mixture.trace, gradient[:4], 0)
    assert torch.equal(fewer.expert_ids, credit.expert_ids[:4])
    assert isinstance(mixture.trace, LayerTrace)
