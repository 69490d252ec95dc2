"""Pieces of real text for prequential evaluation: tokens, and the files they were cut from.

N pieces of L tokens.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import TextTokenizer
from model.training.sources import Domain, documents

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".c", ".h", ".js", ".html", ".tex", ".csv", ".json"})


@dataclass(frozen=True, slots=True)
class Text:
    """One file, read."""

    name: str
    content: str
    sha256: str


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Texts cut to one length."""

    tokens: NDArray[np.int64]  # (N, L + 1)
    file_index: NDArray[np.int64]  # (N,)
    files: tuple[Text, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: NDArray[np.int64] | slice) -> "Pieces":
        return Pieces(self.tokens[rows], self.file_index[rows], self.files)


def texts_of_domain(domain: Domain, split: str, seed: int) -> Iterator[Text]:
    """The installed files of a training domain that belong to a split."""
    for document in documents(domain, split, seed):
        yield Text(str(document.path), document.text, document.sha256)


def texts_in(path: Path) -> Iterator[Text]:
    """A file, or every text file below a folder in the order of their names, each read when its turn comes.

    Raises FileNotFoundError at once, and in its turn UnicodeDecodeError for a file that is not UTF-8.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES)
    return map(_read, found)


def _read(path: Path) -> Text:
    raw = path.read_bytes()
    return Text(str(path), raw.decode("utf-8"), hashlib.sha256(raw).hexdigest())


def cut(
    texts: Iterable[Text],
    tokenizer: TextTokenizer,
    length: int,
    *,
    wanted: int | None = None,
    per_file: int | None = None,
) -> Pieces:
    """Pieces of `length` tokens and the one after, at most `per_file` of a file, until there are `wanted`.

    A file's last, shorter piece is left out.
    """
    rows: list[NDArray[np.int64]] = []
    index: list[int] = []
    files: list[Text] = []
    for text in texts:
        ids = np.array(tokenizer.encode(text.content), dtype=np.int64)
        count = min((len(ids) - 1) // length, per_file or len(ids))
        if wanted is not None:
            count = min(count, wanted - len(rows))
        if count <= 0:
            continue
        rows += [ids[i * length : (i + 1) * length + 1] for i in range(count)]
        index += [len(files)] * count
        files.append(text)
        if wanted is not None and len(rows) == wanted:
            break
    tokens = np.stack(rows) if rows else np.empty((0, length + 1), np.int64)
    return Pieces(tokens, np.array(index, dtype=np.int64), tuple(files))
