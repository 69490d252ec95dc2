"""The texts of the plasticity experiments: which files, which split, and the frozen lower layers' output for them.

Files are split by a hash of their names (model/training/sources.py); no variant was trained on `validation` or
`heldout`. Tuning may look at `validation` only; `heldout` is for the one confirmation run.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.blocks.base import ExpertBlock
from model.tokenizer import TextTokenizer
from model.training.sources import DOMAINS
from model.training.upper import LowerStates
from model.transformer import Transformer
from server.stream.text import Pieces, Text, cut, texts_of_domain

SEED = 2026
SPLITS = {"training": "train", "tuning": "validation", "confirmation": "heldout"}
TRAINED = ("english", "python", "c", "german", "french", "perl")
UNTRAINED = ("spanish", "rust-books", "javascript")
BY_NAME = {domain.name: domain for domain in DOMAINS}


@dataclass(frozen=True, slots=True)
class Entered:
    """Pieces, and the residual stream before the lowest block for each of them."""

    pieces: Pieces
    states: LowerStates

    def batch(self, rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Entry (B, L, H) and targets (B, L)."""
        index = torch.tensor(list(rows))
        return self.states.of(index), torch.from_numpy(self.pieces.tokens[index.numpy(), 1:])


class Texts:
    """Pieces by name, cached in a folder; `files` remembers every file that was used, for the manifest."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: TextTokenizer,
        blocks: Mapping[int, ExpertBlock],
        first: int,
        cache: Path,
    ):
        """Blocks below layer `first` take part as they were trained; those from there on come later."""
        self._model, self._tokenizer, self._first, self._cache = model, tokenizer, first, cache
        self._below = {layer: block for layer, block in blocks.items() if layer < first}
        self.files: dict[str, list[dict[str, str]]] = {}

    def of(
        self,
        domain: str,
        split: str,
        length: int,
        wanted: int,
        *,
        per_file: int | None,
        half: int | None = None,
    ) -> Entered:
        """Pieces of one domain and split. `half` 0 or 1: only every second file, so that two uses share none."""
        use = f"{domain} {split} {length} {wanted} {per_file} {half}"
        pieces = self._kept(use)
        if pieces is None:
            texts = texts_of_domain(BY_NAME[domain], SPLITS[split], SEED)
            chosen = (text for number, text in enumerate(texts) if half is None or number % 2 == half)
            pieces = cut(chosen, self._tokenizer, length, wanted=wanted, per_file=per_file)
            assert len(pieces), f"no text of {domain}, {split}"
            self._keep(use, pieces)
        self._remember(f"{domain} {split} {length}" + ("" if half is None else f" half {half}"), pieces.files)
        return self.enter(pieces)

    def enter(self, pieces: Pieces) -> Entered:
        tokens = torch.from_numpy(pieces.tokens[:, :-1].copy())
        return Entered(pieces, LowerStates(self._model, tokens, self._first, self._cache, self._below))

    def _kept(self, use: str) -> Pieces | None:
        """Reading a manual page takes a process of its own: what was cut once is kept."""
        path = self._cache / f"{use.replace(' ', '-')}.npz"
        if not path.exists():
            return None
        with np.load(path) as kept:
            files = tuple(Text(*each) for each in json.loads(str(kept["files"])))
            return Pieces(kept["tokens"], kept["file_index"], files)

    def _keep(self, use: str, pieces: Pieces) -> None:
        self._cache.mkdir(parents=True, exist_ok=True)
        files = json.dumps([(text.name, "", text.sha256) for text in pieces.files])
        path = self._cache / f"{use.replace(' ', '-')}.npz"
        np.savez(path, tokens=pieces.tokens, file_index=pieces.file_index, files=files)

    def _remember(self, use: str, files: tuple[Text, ...]) -> None:
        self.files[use] = [{"path": text.name, "sha256": text.sha256} for text in files]

    def write_manifest(self, path: Path) -> str:
        """Every file of the run, by use; returns the digest of the list."""
        listed = json.dumps({"seed": SEED, "files": self.files}, indent=1, sort_keys=True)
        path.write_text(listed + "\n")
        return hashlib.sha256(listed.encode()).hexdigest()[:16]


def shuffled(pieces: Pieces, seed: int) -> Pieces:
    order = np.random.default_rng(seed).permutation(len(pieces))
    return pieces.take(order)
