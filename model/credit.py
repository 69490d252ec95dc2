"""How much each selected expert lowered the loss of each token, from the output head alone.

Credit is the loss decrease per unit of score, exactly -d loss / d s_ti:
c_ti = -g_ti (y_ti - o_t) . G_t, with y the expert's output, o the block's output, G_t = d loss_t / d o_t.
`direct` credit takes G at the final hidden state for every layer, as if nothing stood between the block and
the head: forward only, exact for a block behind the last layer, poorer the further below.
T tokens, K selected experts, H hidden.
"""

import torch
from torch import Tensor

from model.blocks.base import LayerTrace
from model.head import loss_and_gradient
from model.transformer import Transformer


@torch.inference_mode()
def loss_gradient(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """G (T, H) float32: derivative of the next-token loss by the final hidden state, per token."""
    _, gradient = loss_and_gradient(
        hidden, model.final_norm, model.config.rms_norm_eps, model.embedding, targets.to(hidden.device)
    )
    return gradient


@torch.inference_mode()
def expert_credit(trace: LayerTrace, gradient: Tensor) -> Tensor:
    """Credit (T, K) float32 of a layer's selected experts, for the leading T rows that have a gradient."""
    rows = slice(0, len(gradient))
    alignment = torch.einsum("tkh,th->tk", trace.deviations[rows], gradient)
    return -trace.gates[rows] * alignment
