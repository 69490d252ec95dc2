"""The trained part of the model as one differentiable pass: from the first block's layer to the loss.

Below the first block everything is frozen and does not depend on any block, so its output is computed once per
window and kept. B windows, T tokens of each, H hidden.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from model.attention import attend_whole
from model.blocks.base import ExpertBlock
from model.head import NextTokenLoss
from model.transformer import Transformer

BlockPass = Callable[[Tensor], tuple[Tensor, Tensor]]  # (B, T, H) -> contribution (B, T, H), auxiliary loss


NO_BLOCKS: Mapping[int, ExpertBlock] = MappingProxyType({})


def lower_states(
    model: Transformer, tokens: Tensor, first_block: int, below: Mapping[int, ExpertBlock] = NO_BLOCKS
) -> Tensor:
    """Hidden states behind layer `first_block`, before its block: tokens (B, T) -> (B, T, H).

    Blocks `below` that layer take part as they were trained.
    """
    with torch.inference_mode():
        hidden, at = model.embed(tokens.to(model.device)), -1
        for layer in sorted(below):
            hidden = run_layers(model, hidden, at + 1, layer + 1)
            hidden = hidden + below[layer](hidden)[0]
            at = layer
        return run_layers(model, hidden, at + 1, first_block + 1)


def run_layers(model: Transformer, hidden: Tensor, first: int, end: int) -> Tensor:
    """Layers `first` to `end - 1` of the base over whole windows (B, T, H)."""
    batch, length, _ = hidden.shape
    rope = model.rope_at(torch.arange(length, device=hidden.device).repeat(batch))
    rows = hidden.flatten(0, 1)
    for weights in model.layers[first:end]:
        rows = model.layer(rows, weights, rope, lambda q, k, v: attend_whole(q, k, v, batch))
    return rows.unflatten(0, (batch, length))


def upper_loss(
    model: Transformer, blocks: Mapping[int, BlockPass], hidden: Tensor, targets: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """From hidden states behind layer `first` to the loss; blocks, if any, sit at `first` or above.

    hidden (B, T, H), targets (B, T) -> next-token loss per token (B, T) and the blocks' auxiliary loss.
    """
    at = first
    auxiliary = torch.zeros((), device=hidden.device)
    for layer in sorted(blocks):
        hidden = run_layers(model, hidden, at + 1, layer + 1)
        contribution, block_loss = blocks[layer](hidden)
        hidden = hidden + contribution
        auxiliary = auxiliary + block_loss
        at = layer
    hidden = run_layers(model, hidden, at + 1, len(model.layers))
    losses = NextTokenLoss.apply(
        hidden.flatten(0, 1), model.final_norm, model.config.rms_norm_eps, model.head, targets.flatten()
    )
    assert isinstance(losses, Tensor)
    return losses.view_as(targets), auxiliary


class LowerStates:
    """Lower-layer outputs of a window set, computed on first use and kept in a memory-mapped file.

    Kept as raw 16-bit words, so every later epoch, learning rate and variant reads what the first computed. The
    file is named for the windows it belongs to.
    """

    def __init__(
        self,
        model: Transformer,
        tokens: Tensor,
        first_block: int,
        folder: Path,
        below: Mapping[int, ExpertBlock] = NO_BLOCKS,
    ):
        self._model, self._tokens, self._first_block, self._below = model, tokens, first_block, below
        shape = (len(tokens), tokens.shape[1], model.config.hidden_size)
        folder.mkdir(parents=True, exist_ok=True)
        content = hashlib.sha256(str(shape).encode() + tokens.numpy().tobytes())
        for layer in sorted(below):
            for parameter in below[layer].parameters():
                content.update(parameter.detach().float().numpy(force=True).tobytes())
        digest = content.hexdigest()[:16]
        path = folder / f"layer-{first_block}-{digest}.u16"
        mode = "r+" if path.is_file() else "w+"
        self._states = np.memmap(path, dtype=np.uint16, mode=mode, shape=shape)
        self._known_path = path.with_suffix(".known")
        self._known = np.memmap(
            self._known_path,
            dtype=np.uint8,
            mode="r+" if self._known_path.is_file() else "w+",
            shape=(len(tokens),),
        )

    def of(self, windows: Tensor) -> Tensor:
        """States of some windows: (B) indices -> (B, T, H) float32."""
        rows = windows.numpy()
        missing = rows[self._known[rows] == 0]
        if len(missing):
            tokens = self._tokens[torch.from_numpy(missing)]
            states = lower_states(self._model, tokens, self._first_block, self._below)
            self._states[missing] = states.bfloat16().cpu().view(torch.int16).numpy().view(np.uint16)
            self._known[missing] = 1
        words = torch.from_numpy(np.asarray(self._states[rows]).view(np.int16))
        return words.view(torch.bfloat16).to(self._model.device).float()
