"""Choosing the K best of E experts, and the losses that keep a router honest while it trains.

T tokens, E experts, K experts per token. Routing is float32 throughout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BALANCE_LOSS_COEF = 0.01  # Switch Transformers section 2.2
ROUTER_Z_LOSS_COEF = 0.001  # ST-MoE section 2
RENORMALIZE_EPS = 1e-9  # mixture-of-flows 0.2.0


def top_k_of_softmax(
    router_logits: Tensor,
    k: int,
    *,
    renormalize: bool = True,
    eps: float = 0.0,
    forced: Sequence[tuple[slice, Tensor]] = (),
) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, the K largest, renormalised over them: (T, E) -> gates and ids, both (T, K).

    `forced`: rows that take the given experts (rows, K) instead of the largest.
    """
    probabilities = router_logits.softmax(-1)
    gates, expert_ids = probabilities.topk(k, dim=-1)
    for rows, ids in forced:
        expert_ids[rows] = ids
        gates[rows] = probabilities[rows].gather(1, expert_ids[rows])
    if renormalize:
        gates = gates / (gates.sum(-1, keepdim=True) + eps)
    return gates, expert_ids


def switch_auxiliary_loss(router_logits: Tensor, expert_ids: Tensor) -> Tensor:
    """0.01 E sum_e f_e P_e / k + 0.001 mean logsumexp^2, f_e tokens that selected e over tokens.

    router_logits (T, E), expert_ids (T, K).
    """
    experts = router_logits.shape[-1]
    share = torch.bincount(expert_ids.flatten(), minlength=experts).float() / expert_ids.numel()
    balance = experts * (share * router_logits.softmax(-1).mean(0)).sum()
    return BALANCE_LOSS_COEF * balance + ROUTER_Z_LOSS_COEF * z_loss(router_logits)


def z_loss(router_logits: Tensor) -> Tensor:
    """Mean squared log partition: keeps router logits small."""
    return router_logits.logsumexp(-1).square().mean()
