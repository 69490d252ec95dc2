"""The canary text as tokens: a file of the operator's, or English and Python that every CPython carries."""

import importlib.util
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor

from model.tokenizer import TextTokenizer

CANARY_TOKENS = 8192  # predicted ones: their loss has a standard error under 0.06 points
MODULES = ("textwrap", "heapq", "json.decoder", "argparse", "statistics")  # code beside the prose
CHARACTERS_A_TOKEN = 64  # at most that many are read for a token


def canary_windows(tokenizer: TextTokenizer, file: Path | None, context: int) -> Tensor:
    """Windows (W, T + 1) of at least CANARY_TOKENS tokens to predict, T at most `context`.

    Raises ValueError when the file holds fewer or is no UTF-8; OSError passes through.
    """
    length = min(512, context)
    count = -(-CANARY_TOKENS // length)
    if file is not None:
        pieces = [(f"guard.canary_file {file}", _read(file), count)]
    else:
        half = count // 2
        pieces = [("the prose", _prose(), count - half), ("the code", _code(), half)]
    return torch.cat([_windows(tokenizer, *piece, length) for piece in pieces])


def _windows(tokenizer: TextTokenizer, name: str, text: str, count: int, length: int) -> Tensor:
    """Consecutive windows; each ends with the token that the next begins with."""
    needed = count * length + 1
    tokens = tokenizer.encode(text[: needed * CHARACTERS_A_TOKEN])
    if len(tokens) < needed:
        raise ValueError(f"{name} holds {len(tokens)} tokens; allowed: {needed} or more")
    return torch.tensor(tokens[:needed]).unfold(0, length + 1, length).clone()


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as opened:
            return opened.read((CANARY_TOKENS + 1) * 2 * CHARACTERS_A_TOKEN)
    except UnicodeDecodeError as error:
        raise ValueError(f"guard.canary_file {file} is not UTF-8: {error.reason}") from error


def _prose() -> str:
    return "\n\n".join(text for _, text in sorted(topics.topics.items()))


def _code() -> str:
    origins = [spec.origin for spec in map(importlib.util.find_spec, MODULES) if spec is not None]
    return "\n".join(Path(origin).read_text(encoding="utf-8") for origin in origins if origin is not None)
