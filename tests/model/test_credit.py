"""Credit is a derivative: autograd is the reference."""

import torch
from torch.testing import assert_close

from model.blocks.base import LayerTrace
from model.credit import expert_credit, loss_gradient
from model.head import NextTokenLoss, loss_and_gradient


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


def test_credit_at_the_last_layer_is_minus_the_derivative_by_the_scores(tiny):
    """y = sum softmax(s)_i e_i behind the last layer: c_i = -d loss / d s_i, exactly."""
    torch.manual_seed(0)
    tokens, selected = 6, 3
    hidden, outputs = torch.randn(tokens, 32), torch.randn(tokens, selected, 32)
    scores = torch.randn(tokens, selected, requires_grad=True)
    targets = torch.randint(0, 97, (tokens,))
    gates = scores.softmax(-1)
    combined = (gates.unsqueeze(-1) * outputs).sum(1)
    final = hidden + combined
    normed = torch.nn.functional.rms_norm(final, (32,), tiny.model.final_norm, 1e-5)
    torch.nn.functional.cross_entropy(
        normed @ tiny.model.embedding.T, targets, reduction="none"
    ).sum().backward()
    trace = LayerTrace(
        torch.zeros(tokens, selected, dtype=torch.int64),
        gates.detach(),
        torch.zeros(tokens, 16),
        outputs - combined.detach().unsqueeze(1),
    )
    credit = expert_credit(trace, loss_gradient(tiny.model, final.detach(), targets))
    assert_close(credit, -scores.grad, atol=1e-5, rtol=1e-4)
