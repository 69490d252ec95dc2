"""Text of the tiny model: what it trains on, what it must not forget, and streams that it has never seen.

Files are split by a hash of their name: `train` teaches the vocabulary and the model, `heldout` measures forgetting,
`validation` makes the streams. Copies go around under other names (the same header for many platforms), so a file
whose lines have mostly been seen in a file used before is left out.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from model.training.sources import DOMAINS, Document, documents

MIXTURE = {"english": 0.5, "python": 0.4, "c": 0.1}  # of the tokens trained on
VOCABULARY_CHARS = 3_000_000  # text that the vocabulary is learned from
CONTEXTS_PER_FILE = {"train": 50, "heldout": 4}  # so that many files are seen, not a few long ones
MOST_SEEN_LINES = 0.3  # of a file's lines
SHORT_LINE = 30  # characters; shorter lines say nothing about where they come from
SEED = 2026


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids. C context length, N sessions of S tokens, each one contiguous piece of its own file."""

    train: Tensor  # (W, C + 1)
    heldout: Tensor  # (W, C + 1), in the proportions of the mixture
    heldout_files: Tensor  # (W): which file
    streams: dict[str, Tensor]  # domain -> (N, S + 1)
    sources: dict[str, list[str]]  # domain -> path of each session's file


def load(
    context: int,
    vocabulary: int,
    train_tokens: int,
    heldout_tokens: int,
    stream_domains: list[str],
    sessions: int,
    session_tokens: int,
) -> Text:
    """Raises TrainingDataMissing when a domain is not installed."""
    taught = {name: _first_chars(name, "train", VOCABULARY_CHARS * share) for name, share in MIXTURE.items()}
    tokenizer = learn_vocabulary([document.text for each in taught.values() for document in each], vocabulary)
    seen: set[int] = set()
    train = [
        _pieces(tokenizer, name, "train", context, int(train_tokens * share), seen)[0]
        for name, share in MIXTURE.items()
    ]
    heldout = [
        _pieces(tokenizer, name, "heldout", context, int(heldout_tokens * share), seen)
        for name, share in MIXTURE.items()
    ]
    streams, sources = {}, {}
    for name in stream_domains:
        streams[name], sources[name] = _sessions(tokenizer, name, sessions, session_tokens, seen)
    files = [1000 * domain + each for domain, (_, each) in enumerate(heldout)]
    return Text(
        torch.cat(train), torch.cat([each for each, _ in heldout]), torch.cat(files), streams, sources
    )


def learn_vocabulary(texts: list[str], size: int) -> Tokenizer:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _documents(name: str, split: str) -> Iterator[Document]:
    return documents(next(domain for domain in DOMAINS if domain.name == name), split, SEED)


def _first_chars(name: str, split: str, chars: float) -> list[Document]:
    chosen: list[Document] = []
    for document in _documents(name, split):
        if chars <= 0:
            break
        chosen.append(document)
        chars -= len(document.text)
    return chosen


def _is_copy(text: str, seen: set[int]) -> bool:
    """Whether too many of a text's lines were seen before; if not, all of them have been now."""
    lines = {hash(line.strip()) for line in text.splitlines() if len(line.strip()) >= SHORT_LINE}
    if len(lines & seen) > MOST_SEEN_LINES * len(lines):
        return True
    seen |= lines
    return False


def _pieces(
    tokenizer: Tokenizer, name: str, split: str, context: int, tokens: int, seen: set[int]
) -> tuple[Tensor, Tensor]:
    """Contexts (W, C + 1) and the file of each (W)."""
    wanted = tokens // context
    pieces, files = [], []
    bar = tqdm(total=wanted * context, desc=f"{name} {split}", unit="tok", unit_scale=True, leave=False)
    for number, document in enumerate(_documents(name, split)):
        if _is_copy(document.text, seen):
            continue
        ids = tokenizer.encode(document.text).ids
        cut = [ids[i : i + context + 1] for i in range(0, len(ids) - context, context)]
        cut = cut[: min(CONTEXTS_PER_FILE[split], wanted - len(pieces))]
        pieces += cut
        files += [number] * len(cut)
        bar.update(len(cut) * context)
        if len(pieces) == wanted:
            break
    bar.close()
    return torch.from_numpy(np.array(pieces, dtype=np.int64)), torch.tensor(files)


def _sessions(
    tokenizer: Tokenizer, name: str, sessions: int, session_tokens: int, seen: set[int]
) -> tuple[Tensor, list[str]]:
    """One session from the middle of each file that is long enough; many files begin with a licence."""
    taken: list[list[int]] = []
    paths: list[str] = []
    # A domain of which nothing is trained on may give its training files too.
    splits = ["validation"] if name in MIXTURE else ["validation", "heldout", "train"]
    unseen = itertools.chain.from_iterable(_documents(name, split) for split in splits)
    bar = tqdm(total=sessions, desc=f"{name} stream", unit="file", leave=False)
    for document in unseen:
        ids = tokenizer.encode(document.text).ids
        start = (len(ids) - session_tokens - 1) // 2
        if start < 0 or _is_copy(document.text, seen):
            continue
        taken.append(ids[start : start + session_tokens + 1])
        paths.append(str(document.path))
        bar.update()
        if len(taken) == sessions:
            break
    bar.close()
    return torch.from_numpy(np.array(taken, dtype=np.int64)), paths
