"""Recorded calls, and transfers that nobody waits for. The only file here that knows CUDA.

On a CPU a recorded call is the call itself, so all that is recorded can be tested there.
"""

import threading
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from model.keys import Float32Array

Call = Callable[[], None]


class Recorder:
    """Records calls that share memory for what they compute in between; they are replayed one after another."""

    _alone: ClassVar = threading.Lock()  # a process can have one recording under way

    def __init__(self, device: torch.device):
        self._device = device
        cuda = device.type == "cuda"
        # Recordings share memory if they were made on one stream.
        self._own = (torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)) if cuda else None

    def capture(self, call: Call) -> Call:
        """What does `call`'s work again without its Python: the same operations on the same addresses.

        `call` must do the same whenever its inputs are the same, as it runs once beforehand.
        """
        if self._own is None:
            return call
        memory, side = self._own
        with self._alone, torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up, which cannot be recorded
                call()
            torch.cuda.current_stream().wait_stream(side)
            # Other threads compute meanwhile: keys are judged, lessons turned into gradients.
            with torch.cuda.graph(graph, memory, side, capture_error_mode="thread_local"):
                call()

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay


def upload(
    values: Sequence[float] | Sequence[Sequence[float]] | Float32Array,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Numbers as a tensor of the device; work that is queued there goes on."""
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class Download:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor):
        cuda = tensor.device.type == "cuda"
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
        self._host.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.current_stream(tensor.device).record_event() if cuda else None

    def result(self) -> Tensor:
        """Waits until it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
