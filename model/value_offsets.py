"""Value offsets: what a session adds to each expert's output, learned from its own text; experts and keys stay.

Ours, not the seeds' mechanism. A block's output becomes sum_i g_i (e_i(x) + v_i): the routing keys address a small
memory of one vector per expert, which starts at zero and is gone with its session. A plain gradient step would mostly
change what all tokens' logits have in common, as the head's rows point alike; `head_metric` takes that out.
... any leading dimensions (none, or B sessions), R rows of a batch, T tokens, K experts per token, E experts, H hidden,
V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.blocks.base import BlockSpan

METRIC_RIDGE = 1.0  # of the mean eigenvalue
HEAD_CHUNK = 4096  # rows of the head at once


@torch.inference_mode()
def head_metric(final_norm: Tensor, head: Tensor) -> Tensor:
    """(M + ridge tr(M)/H I)^-1, M = mean over the vocabulary of w w^T, w = final_norm * head's row: (H, H) float32.

    final_norm (H), head (V, H). The Gauss-Newton matrix of the logits by the normalised final state, every token
    counting alike: a step along metric @ gradient moves logits where the loss asks for it, at equal effort everywhere.
    """
    moment = torch.zeros(head.shape[1], head.shape[1], device=head.device)
    for rows in head.split(HEAD_CHUNK):
        weighted = rows.float() * final_norm.float()
        moment += weighted.T @ weighted
    moment /= len(head)
    ridge = METRIC_RIDGE * moment.diagonal().mean()
    return torch.linalg.inv(moment + ridge * torch.eye(len(moment), device=head.device)).clone()


def directions(gradient: Tensor, final: Tensor, metric: Tensor) -> Tensor:
    """What each token asks of the output, (..., T, H): metric @ the derivative by the normalised final state.

    gradient (..., T, H): G of direct credit, the derivative of each token's loss by its final state `final`
    (..., T, H), which the final norm divides by its root mean square; metric (H, H).
    """
    return (gradient * final.float().square().mean(-1, keepdim=True).sqrt()) @ metric


def pulls(expert_ids: Tensor, gates: Tensor, wanted: Tensor, num_experts: int) -> Tensor:
    """sum_t g_ti d_t of every expert, (..., E, H): sums, which add up over a window's pieces.

    expert_ids and gates (..., T, K); wanted (..., T, H): d, each token's `directions`.
    """
    shares = gates.new_zeros(*gates.shape[:-1], num_experts).scatter(-1, expert_ids, gates)  # (..., T, E)
    return shares.transpose(-1, -2) @ wanted


def moved(
    offsets: Tensor, pulled: Tensor, output_norms: Tensor, rate: float, bound: float, num_experts_per_tok: int
) -> Tensor:
    """The offsets (..., E, H) after a window whose `pulls` sum up to `pulled`; the old ones are not written.

    v_i <- v_i - rate |x_out| / sqrt(H) (pulled_i / T) E / K, then no longer than bound |x_out|. |x_out| is the median of
    `output_norms` (..., T), the norms of the residual stream behind the block for the window's tokens: not the mean,
    as a text's first token is a hundred times as long as any other in the models we serve. E / K makes an expert of
    fair share move as far as one that is always selected.
    """
    (num_experts, hidden), tokens = offsets.shape[-2:], output_norms.shape[-1]
    norm = output_norms.median(dim=-1).values[..., None, None]
    step = norm * (rate * num_experts / (tokens * num_experts_per_tok * hidden**0.5))
    stepped = offsets - pulled * step
    length = torch.linalg.vector_norm(stepped, dim=-1, keepdim=True)
    return stepped * (bound * norm / length.clamp_min(torch.finfo(offsets.dtype).tiny)).clamp_max(1.0)


def updated(
    offsets: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    wanted: Tensor,
    output_norms: Tensor,
    rate: float,
    bound: float,
) -> Tensor:
    """`moved` by one whole window: expert_ids, gates (..., T, K), wanted (..., T, H), output_norms (..., T)."""
    pulled = pulls(expert_ids, gates, wanted, offsets.shape[-2])
    return moved(offsets, pulled, output_norms, rate, bound, expert_ids.shape[-1])


def add_offsets(
    combined: Tensor, expert_ids: Tensor, gates: Tensor, layer: int, spans: Sequence[BlockSpan]
) -> None:
    """Add sum_i g_i v_i to the rows of sequences with offsets in this layer; no other row is touched.

    combined (R, H) is a block's output so far; expert_ids and gates (R, K).
    """
    holding = [span for span in spans if span.offsets is not None and layer in span.offsets]
    if not holding:
        return
    rows = torch.cat([torch.arange(span.first, span.end, device=combined.device) for span in holding])
    selected = torch.cat(
        [
            span.offsets[layer][expert_ids[span.first : span.end]]
            for span in holding
            if span.offsets is not None
        ]
    )  # (R, K, H)
    combined[rows] += (selected * gates[rows].unsqueeze(-1)).sum(1)
