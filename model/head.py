"""Next-token loss at the output head, with its derivative by the final hidden state in the same pass.

T tokens, H hidden, V vocabulary. The head is frozen: nothing here has a weight gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

HEAD_CHUNK = 128  # rows of logits alive at once: 128 x 49,152 float32 is 24 MiB, which a cache can hold


def next_token_loss(hidden: Tensor, norm: Tensor, eps: float, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per token: hidden (T, H) before the final norm, targets (T) -> (T) float32. No derivative."""
    losses: list[Tensor] = []
    for rows, wanted in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
        normed = F.rms_norm(rows.float(), norm.shape, norm.float(), eps)
        logits = F.linear(normed.to(head.dtype), head).float()
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(losses)


def loss_and_gradient(
    hidden: Tensor,
    norm: Tensor,
    eps: float,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    error_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy per token and its derivative by the hidden state before the final norm.

    hidden (T, H), norm (H), head (V, H), targets (T) int64 -> loss (T) float32, gradient (T, H) float32. `bias` (V)
    float32 is added to every token's logits; the derivative by it is added to `error_sum` (V).
    d loss / d logits = softmax - onehot; through the head: W_U^T (softmax - onehot); then through the RMS norm.
    """
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    gradient = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    for first in range(0, len(hidden), HEAD_CHUNK):
        rows = slice(first, first + HEAD_CHUNK)
        raw = hidden[rows].float()
        scale = torch.rsqrt(raw.square().mean(-1, keepdim=True) + eps)
        normed = raw * scale
        logits = F.linear((normed * norm.float()).to(head.dtype), head).float()
        if bias is not None:
            logits += bias
        target = targets[rows].unsqueeze(1)
        log_probabilities = logits.log_softmax(-1)
        losses[rows] = -log_probabilities.gather(1, target).squeeze(1)
        errors = log_probabilities.exp_()
        errors.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=torch.float32))
        if error_sum is not None:
            error_sum += errors.sum(0)
        by_normed = (errors.to(head.dtype) @ head).float() * norm.float()
        mean_product = (by_normed * normed).mean(-1, keepdim=True)
        gradient[rows] = scale * (by_normed - normed * mean_product)
    return losses, gradient


class NextTokenLoss(torch.autograd.Function):
    """The loss of `loss_and_gradient` as a differentiable function of the hidden state alone."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - autograd passes the arguments on
        ctx: FunctionCtx, hidden: Tensor, norm: Tensor, eps: float, head: Tensor, targets: Tensor
    ) -> Tensor:
        losses, gradient = loss_and_gradient(hidden, norm, eps, head, targets)
        ctx.save_for_backward(gradient.to(hidden.dtype))
        return losses

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, by_loss: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue] - typed loosely in torch
        return gradient * by_loss.unsqueeze(1).to(gradient.dtype), None, None, None, None
