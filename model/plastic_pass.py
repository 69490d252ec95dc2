"""The upper layers with given routing keys: losses, and the credit of every plastic layer's experts.

Where the routing keys act, and nothing below: what enters is the residual stream before the lowest plastic block. Used
to evaluate a rule offline and to compute `gradient` credit of a prompt beside serving. A long text comes in pieces;
earlier pieces are remembered as attention keys and values, and no gradient flows into them.
B texts, T tokens of each in this piece, P tokens before them, H hidden, E experts, D key size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from model.attention import attend_piece
from model.blocks.base import ExpertBlock, LayerTrace
from model.blocks.some import SomeBlock
from model.head import NextTokenLoss, loss_and_gradient, next_token_loss
from model.transformer import Transformer

CreditKind = Literal["none", "direct", "gradient"]


@dataclass(slots=True)
class UpperPast:
    """Attention keys and values of the pieces so far, by layer: (B, G, P, head size) each."""

    length: int = 0
    by_layer: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor]])


@dataclass(slots=True)
class PassResult:
    """What one piece left behind."""

    losses: Tensor  # (B, T) next-token loss in nats
    final: Tensor  # (B, T, H) before the final norm
    traces: dict[int, LayerTrace]  # of the B * T rows
    gradients: dict[int, Tensor]  # G by plastic layer, (B * T, H); empty without credit
    outputs: dict[int, Tensor]  # the residual stream behind each plastic block, (B, T, H)
    by_bias: Tensor | None = None  # derivative of the summed losses by the output bias, (B, V)


class PlasticPass:
    """One base and its expert blocks, ready to run the upper layers."""

    def __init__(self, model: Transformer, blocks: Mapping[int, ExpertBlock], plastic_layers: frozenset[int]):
        self._model, self._blocks, self.plastic_layers = model, blocks, plastic_layers
        self.first = min(plastic_layers)

    def run(
        self,
        hidden: Tensor,
        targets: Tensor,
        keys: Mapping[int, Tensor],
        *,
        past: UpperPast | None = None,
        credit: CreditKind = "none",
        offsets: Mapping[int, Tensor] | None = None,
        forced: Mapping[int, Tensor] | None = None,
        visible_ids: Mapping[int, Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> PassResult:
        """hidden (B, T, H) before the block of layer `first`, targets (B, T); extends `past`.

        keys by layer, (E, D) or (B, E, D); layers of `some` that are not plastic use them too. `offsets`,
        `forced` and `visible_ids` as `SomeBlock.mix` takes them; `bias` (B, V) is added to each text's logits.
        """
        past = UpperPast() if past is None else past
        differentiable = credit == "gradient"
        assert bias is None or not differentiable, "gradient credit knows no output bias"
        result = PassResult(torch.empty(0), hidden, {}, {}, {})
        outputs: dict[int, Tensor] = {}
        with torch.set_grad_enabled(differentiable):
            for layer in range(self.first, len(self._model.layers)):
                if layer > self.first:
                    hidden = self._layer(hidden, layer, past)
                block = self._blocks.get(layer)
                if block is None:
                    continue
                if isinstance(block, SomeBlock):
                    mixture = block.mix(
                        block.normed(hidden),
                        keys[layer],
                        None if offsets is None else offsets.get(layer),
                        None if forced is None else forced.get(layer),
                        None if visible_ids is None else visible_ids.get(layer),
                    )
                    contribution = mixture.combined
                    if layer in self.plastic_layers:
                        result.traces[layer] = _detached(mixture.trace)
                        if differentiable:
                            # A leaf of zeros beside the block's output: its gradient is d loss / d output.
                            outputs[layer] = torch.zeros_like(contribution, requires_grad=True)
                            contribution = contribution + outputs[layer]
                else:
                    contribution, _ = block(hidden)
                hidden = hidden + contribution
                if layer in self.plastic_layers:
                    result.outputs[layer] = hidden.detach()
            past.length += targets.shape[1]
            result.by_bias = None if bias is None else torch.zeros_like(bias)
            needs = credit != "none" or bias is not None
            flat, gradient = self._loss(hidden, targets, bias, result.by_bias, needs_gradient=needs)
            result.losses, result.final = flat.detach().view_as(targets), hidden.detach()
        if differentiable:
            by_output = torch.autograd.grad(flat.sum(), list(outputs.values()))
            result.gradients = {layer: g.flatten(0, 1) for layer, g in zip(outputs, by_output, strict=True)}
        elif credit == "direct":
            result.gradients = dict.fromkeys(result.traces, gradient)
        return result

    def _loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        by_bias: Tensor | None,
        *,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """Losses and, where they are needed, derivatives by the final hidden state; both of the B * T rows."""
        model = self._model
        head = (model.final_norm, model.config.rms_norm_eps, model.head)
        if hidden.requires_grad:
            losses = NextTokenLoss.apply(hidden.flatten(0, 1), *head, targets.flatten())
            assert isinstance(losses, Tensor)
            return losses, losses
        if not needs_gradient:
            losses = next_token_loss(hidden.flatten(0, 1), *head, targets.flatten())
            return losses, losses
        if bias is None or by_bias is None:
            return loss_and_gradient(hidden.flatten(0, 1), *head, targets.flatten())
        texts = zip(hidden, targets, bias, by_bias, strict=True)
        parts = [loss_and_gradient(rows, *head, wanted, own, by_own) for rows, wanted, own, by_own in texts]
        return torch.cat([losses for losses, _ in parts]), torch.cat([gradient for _, gradient in parts])

    def _layer(self, hidden: Tensor, layer: int, past: UpperPast) -> Tensor:
        batch, length, _ = hidden.shape
        model = self._model
        positions = torch.arange(past.length, past.length + length, device=hidden.device)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            attended, (keys, values) = attend_piece(query, key, value, batch, past.by_layer.get(layer))
            past.by_layer[layer] = (keys.detach(), values.detach())
            return attended

        rope = model.rope_at(positions.repeat(batch))
        return model.layer(hidden.flatten(0, 1), model.layers[layer], rope, attend).view_as(hidden)


def _detached(trace: LayerTrace) -> LayerTrace:
    return LayerTrace(trace.expert_ids, trace.gates.detach(), trace.queries.detach(), trace.normed.detach())
