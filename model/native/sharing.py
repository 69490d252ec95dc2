"""Work that several threads take piece by piece, without Python's lock and without waiting for a thread that is not there.

The thread that leads offers one job after another, each of so many equal pieces; whoever is free takes the next piece.
A thread that the kernel has not woken takes none, so the others lose its help and nothing else. One that is put aside
within a piece holds the others up: once, for then the leader goes on alone, and calls nobody for a while.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownLambdaType=false

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from model.native.simd import I64, VOID, Builder, call

# What a board holds: the job on offer with the number of its next piece, how many pieces are done, who was late.
TICKET, DONE, LATE = 0, 8, 16  # in bytes
SPINS, PATIENCE = (
    2_000,
    20_000,
)  # pauses before the processor is offered to others, and before a helper is late
MOST_CALLS_ALONE = 256
PIECE_BITS, LAYER_BITS = 20, 12
OVER = -1  # the ticket after the last job
NOTHING, GONE = -1, -2  # kinds that are no job: nothing is left of this one; there will be no other

Board = NDArray[np.int64]


def _atomic(result: Any, arguments: int, spelled: Callable[..., Any]) -> Callable[..., Any]:
    """A function of an address and more numbers, for numba."""

    def generate(context: Any, b: Builder, signature: Any, values: Any) -> Any:
        found = spelled(b, b.inttoptr(values[0], I64.as_pointer()), *values[1:])
        return context.get_dummy_value() if result is types.void else found

    if arguments == 1:
        return intrinsic(lambda typingctx, address: (result(types.int64), generate))
    if arguments == 2:
        return intrinsic(lambda typingctx, address, value: (result(types.int64, types.int64), generate))
    return intrinsic(lambda typingctx, address, old, new: (result(*[types.int64] * 3), generate))


_load = _atomic(types.int64, 1, lambda b, at: b.load_atomic(at, "acquire", 8))
_store = _atomic(types.void, 2, lambda b, at, value: b.store_atomic(value, at, "release", 8))
_add = _atomic(types.int64, 2, lambda b, at, value: b.atomic_rmw("add", at, value, "acq_rel"))
_swap = _atomic(
    types.boolean,
    3,
    lambda b, at, old, new: b.extract_value(b.cmpxchg(at, old, new, "acq_rel", "acquire"), 1),
)
_yield_processor = types.ExternalFunction("sched_yield", types.int32())
_pause = _atomic(types.void, 1, lambda b, at: call(b, "llvm.x86.sse2.pause", VOID))


@njit
def offer(board, kind, layer, pieces):
    """Put a job of a number of pieces on the board. The one before is done; a neighbour differs in kind or layer."""
    address = board.ctypes.data
    _store(address + DONE, 0)
    job = (kind << LAYER_BITS | layer) << PIECE_BITS | pieces
    _store(address + TICKET, job << PIECE_BITS)


@njit
def take(board):
    """The kind, layer and number of a piece that is now the caller's, or NOTHING, or GONE."""
    address = board.ctypes.data
    while True:
        ticket = _load(address + TICKET)
        if ticket == OVER:
            return GONE, 0, 0
        mask = (1 << PIECE_BITS) - 1
        piece, pieces, job = ticket & mask, ticket >> PIECE_BITS & mask, ticket >> 2 * PIECE_BITS
        if piece >= pieces:
            return NOTHING, 0, 0
        if _swap(address + TICKET, ticket, ticket + 1):
            return job >> LAYER_BITS, job & ((1 << LAYER_BITS) - 1), piece


@njit
def finish(board):
    """Say that a piece is done."""
    _add(board.ctypes.data + DONE, 1)


@njit
def wait_for(board, pieces):
    """Until all pieces of the job are done. Who keeps the leader waiting is sent home."""
    address, waited = board.ctypes.data, 0
    while _load(address + DONE) < pieces:
        waited = rest(board, waited)
        if waited == PATIENCE:
            _store(address + LATE, 1)


@njit
def sent_home(board):
    return _load(board.ctypes.data + LATE) != 0


@njit
def rest(board, waited):
    """A moment; returns how many there have been."""
    _pause(board.ctypes.data)
    if waited > SPINS:
        _yield_processor()
    return waited + 1


@njit
def close(board):
    """No more jobs: those that follow go."""
    _store(board.ctypes.data + TICKET, OVER)


class Helpers:
    """Threads that follow when they are called, each one call after another.

    `follow(board, leads, first, last, *job)` returns when all is done, or, unless it leads, when it is sent home.
    """

    def __init__(self, follow: Callable[..., None]):
        self._follow = follow
        self._helping = threading.Lock()
        self._calls: list[SimpleQueue[tuple[Any, ...]]] = []
        self._alone = self._next_alone = (
            0  # calls to be done alone: now, and after the next time that one is late
        )

    def lead(self, first: int, last: int, job: tuple[Any, ...]) -> None:
        """Do the job on the calling thread, beside which the helpers follow unless they are busy with another.

        As many threads work as torch has at the time.
        """
        board, threads = np.zeros(3, np.int64), torch.get_num_threads()
        free = threads > 1 and self._helping.acquire(blocking=False)
        try:
            if free:
                self._call(threads - 1, (board, False, 0, 0, *job))
            self._follow(board, True, first, last, *job)
        finally:
            if free:
                self._learn(board)
                self._helping.release()

    def _call(self, count: int, arguments: tuple[Any, ...]) -> None:
        """Let `count` threads run `follow(*arguments)`, none of which is waited for; nobody shortly after a delay."""
        if self._alone:
            self._alone -= 1
            return
        while len(self._calls) < count:
            calls = SimpleQueue[tuple[Any, ...]]()
            threading.Thread(target=self._run, args=(calls,), name="decode", daemon=True).start()
            self._calls.append(calls)
        for calls in self._calls[:count]:
            calls.put(arguments)

    def _learn(self, board: Board) -> None:
        """From how a call went: whether somebody was late."""
        if board[LATE // 8]:
            self._alone = self._next_alone = min(max(8, 2 * self._next_alone), MOST_CALLS_ALONE)
        elif not self._alone:
            self._next_alone = max(0, self._next_alone - 1)

    def _run(self, calls: "SimpleQueue[tuple[Any, ...]]") -> None:
        unbind()
        while True:
            self._follow(*calls.get())


def unbind() -> None:
    """For a new thread: the one that started it may be bound to one processor (docs/performance.md); the process is not."""
    os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
