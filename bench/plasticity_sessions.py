"""Experiment 2, sessions: each text is a session of its own that starts at the anchors and is thrown away after.

Every 256 tokens are predicted, then learned from. With 2,048 tokens of context attention carries the whole text; with
256 every window begins without one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from plasticity_texts import Texts
from tqdm import tqdm

from model.blocks.some import SomeBlock
from model.transformer import Transformer
from server.stream.adapter import Adapter, run_texts
from server.stream.rules import StreamRule
from server.stream.text import Pieces

LENGTH, WINDOW = 2048, 256
RESAMPLES = 2000


@dataclass(frozen=True, slots=True, eq=False)
class SessionLosses:
    """Mean loss of every session under every rule, for one domain and context."""

    domain: str
    context: int
    file_index: NDArray[np.int64]  # (B,)
    losses: Mapping[str, NDArray[np.float64]]  # rule -> (B,)
    drift: Mapping[str, float]

    def gain(self, rule: str) -> NDArray[np.float64]:
        """Percent of the frozen loss saved, session by session (B,)."""
        frozen = self.losses["frozen"]
        return 100 * (frozen - self.losses[rule]) / frozen


def run_sessions(
    model: Transformer,
    blocks: Mapping[int, SomeBlock],
    texts: Texts,
    domain: str,
    split: str,
    context: int,
    rules: list[StreamRule],
    sessions: int,
    batch: int,
) -> SessionLosses:
    """Every rule on the same sessions."""
    pieces = texts.of(domain, split, LENGTH, sessions, per_file=4).pieces
    cut = pieces if context == LENGTH else _windows_apart(pieces)
    entered = texts.enter(cut)
    per_session = len(cut) // len(pieces)
    losses: dict[str, list[float]] = {rule.name: [] for rule in rules}
    drift: dict[str, float] = {}
    work = [(rule, first) for rule in rules for first in range(0, len(pieces), batch)]
    for rule, first in tqdm(work, desc=f"{domain}, context {context}", unit="batch"):
        members = range(first, min(first + batch, len(pieces)))
        adapter = Adapter(model, blocks, rule, len(members))
        entry, targets = entered.batch(s * per_session + w for s in members for w in range(per_session))
        entry = entry.view(len(members), LENGTH, -1)
        lost = run_texts(adapter, entry, targets.view(len(members), LENGTH), WINDOW, carry=context == LENGTH)
        losses[rule.name] += lost.double().mean(1).tolist()
        drift[rule.name] = max(drift.get(rule.name, 0.0), adapter.drift())
    return SessionLosses(
        domain, context, pieces.file_index, {name: np.array(each) for name, each in losses.items()}, drift
    )


def interval(gains: NDArray[np.float64], file_index: NDArray[np.int64]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean gain, resampling files: pieces of one file are alike."""
    files = np.unique(file_index)
    sums = np.array([gains[file_index == f].sum() for f in files])
    counts = np.array([(file_index == f).sum() for f in files])
    picks = np.random.default_rng(0).integers(len(files), size=(RESAMPLES, len(files)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _windows_apart(pieces: Pieces) -> Pieces:
    """Each text as windows of their own, in order."""
    count = LENGTH // WINDOW
    rows = [piece[i * WINDOW : (i + 1) * WINDOW + 1] for piece in pieces.tokens for i in range(count)]
    return Pieces(np.stack(rows), np.repeat(pieces.file_index, count), pieces.files)
