"""A person's own text as training windows: the files of a folder, split by file. Knows no sources and no markup."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import TextTokenizer
from model.training.data import WindowSet
from model.training.errors import TrainingDataMissing

WINDOW = 256  # tokens; each window is one independent sequence
HELDOUT_SHARE = 0.1  # of the files, one at least


@dataclass(frozen=True, slots=True)
class FolderText:
    """The windows of both splits, and how many files were no UTF-8 text."""

    train: WindowSet
    heldout: WindowSet
    passed_over: int


def read_folder(folder: Path, tokenizer: TextTokenizer, end_of_text: int) -> FolderText:
    """Cut the files of a folder and of those below into windows of WINDOW + 1 tokens.

    A file is trained on or held out, by a hash of its name. Files of a split stand one behind another, each closed by
    `end_of_text`, so short ones count too. Links and hidden files are left out. Raises TrainingDataMissing when a
    split is empty.
    """
    texts, passed_over = _texts(folder)
    if len(texts) < 2:
        raise TrainingDataMissing(
            f"{folder} has {len(texts)} files of UTF-8 text; allowed: 2 or more, as one is held out"
        )
    names = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    heldout = max(1, round(len(names) * HELDOUT_SHARE))
    splits = {"held out": names[:heldout], "to train on": names[heldout:]}
    cut = {
        split: _windows(folder.name, [[*tokenizer.encode(texts[name]), end_of_text] for name in chosen])
        for split, chosen in splits.items()
    }
    for split, windows in cut.items():
        if not len(windows):
            raise TrainingDataMissing(
                f"{folder}: the files {split} ({', '.join(splits[split][:3])}) have fewer than {WINDOW + 1} tokens"
            )
    return FolderText(cut["to train on"], cut["held out"], passed_over)


def _texts(folder: Path) -> tuple[dict[str, str], int]:
    """Text by name relative to the folder, in a fixed order, and the number of files that have none."""
    if not folder.is_dir():
        raise TrainingDataMissing(f"{folder} is no folder")
    texts: dict[str, str] = {}
    passed_over = 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file() or any(part.startswith(".") for part in name.split("/")):
            continue
        try:
            text = path.read_text(encoding="utf-8", errors="strict")
        except UnicodeDecodeError:
            passed_over += 1
            continue
        if text.strip():
            texts[name] = text
    return texts, passed_over


def _windows(name: str, files: list[list[int]]) -> WindowSet:
    """A window belongs to the file that its first token is from."""
    tokens: NDArray[np.int32] = np.array([token for file in files for token in file], dtype=np.int32)
    of_file = np.repeat(np.arange(len(files), dtype=np.int32), [len(file) for file in files])
    starts = np.arange(0, len(tokens) - WINDOW, WINDOW)
    rows = tokens[starts[:, None] + np.arange(WINDOW + 1)]
    return WindowSet(name, rows, of_file[starts])
