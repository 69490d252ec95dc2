"""How recorded calls compute: in kernels where there is a GPU that they can be compiled for, else in torch's operations."""

import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.graphs import torch_layers
from model.graphs.batch import Batch
from model.graphs.kv_pool import PooledBudget
from model.transformer import Transformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Way:
    """What fills a batch, and logits of its rows (None: as those of other rows)."""

    run_layers: Callable[[Transformer, PooledBudget, Batch], None]
    logits: Callable[[Transformer, Tensor], Tensor] | None = None


IN_TORCH = Way(torch_layers.run_layers)


def way_on(device: torch.device) -> Way:
    """Kernels need triton, which torch for CPUs comes without, and at their first start a C compiler."""
    if device.type != "cuda":
        return IN_TORCH
    try:
        from model.graphs.kernels import layers

        layers.try_out(device)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as failure:
        logger.warning("decoding will be slower, kernels cannot be compiled here: %s", failure)
        return IN_TORCH
    return Way(layers.run_layers, layers.logits)
