"""The bytes that each token stands for, and nothing else: from how a tokenizer spells its tokens.

Two spellings are known. Byte-level BPE (GPT-2's) writes every byte as a printable character. SentencePiece's writes
text, `▁` for a space and `<0x0A>` for a byte that no token has.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from model.errors import CheckpointError

SPACE = "▁"
BYTE = re.compile(r"<0x([0-9A-F]{2})>", re.ASCII)


def byte_table(backend: Tokenizer, vocab_size: int = 0) -> list[bytes]:
    """Bytes by token id, `vocab_size` of them (0: as many as there are); nothing for ids without a token.

    Raises CheckpointError.
    """
    described: Any = json.loads(backend.to_str())  # Any: JSON
    kinds = _kinds(described.get("decoder"))
    if "ByteLevel" in kinds:
        spelled = _byte_level()
    elif kinds & {"Metaspace", "Replace"}:
        spelled = _sentence_piece(byte_fallback=bool(described["model"].get("byte_fallback")))
    else:
        raise CheckpointError(
            f"the tokenizer spells its tokens in a way that is not known (decoder {sorted(kinds)});"
            " allowed: byte-level BPE, SentencePiece"
        )
    added = backend.get_added_tokens_decoder()
    tokens = {token_id: token for token, token_id in backend.get_vocab(with_added_tokens=True).items()}
    named = max(tokens, default=-1) + 1
    if vocab_size and named > vocab_size:
        raise CheckpointError(f"the tokenizer has {named} tokens; the model has {vocab_size}")
    table: list[bytes] = []
    for token_id in range(vocab_size or named):
        token = tokens.get(token_id, "")
        table.append(token.encode() if token_id in added else spelled(token))
    return table


def strips_leading_space(backend: Tokenizer) -> bool:
    """Whether the tokenizer writes a space before a text that its decoder takes away again."""
    decoder: Any = json.loads(backend.to_str()).get("decoder")  # Any: JSON
    return bool(_kinds(decoder) & {"Metaspace", "Strip"})


def _kinds(decoder: Any) -> set[str]:  # Any: JSON
    """The types of a decoder and of its parts."""
    if not isinstance(decoder, dict):
        return set()
    found = {str(decoder.get("type"))}
    for part in decoder.get("decoders") or []:
        found |= _kinds(part)
    return found


def _byte_level() -> Callable[[str], bytes]:
    """Undoes the byte-to-printable-character map of GPT-2's byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    character_to_byte = {chr(b): b for b in printable}
    character_to_byte |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}

    def spelled(token: str) -> bytes:
        if any(character not in character_to_byte for character in token):
            return token.encode()
        return bytes(character_to_byte[character] for character in token)

    return spelled


def _sentence_piece(*, byte_fallback: bool) -> Callable[[str], bytes]:
    def spelled(token: str) -> bytes:
        byte = BYTE.fullmatch(token) if byte_fallback else None
        return token.replace(SPACE, " ").encode() if byte is None else bytes([int(byte[1], 16)])

    return spelled
