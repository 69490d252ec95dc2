"""Text to token ids and back, chat messages to a prompt. Byte-level BPE, built from the model file's own lists."""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from model.checkpoints.gguf import GGUFFile
from model.errors import ChatTemplateError, CheckpointError

CONTROL_TOKEN = 3  # gguf token type of special tokens
PRE_TOKENIZERS = {  # tokenizer.ggml.pre -> how text is split before merging
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """Everything a tokenizer is made of, as plain values that can be kept in a JSON file."""

    backend: str  # a `tokenizers` tokenizer in its own JSON form
    special_ids: list[int]
    chat_template: str
    bos_token: str
    eos_token: str


def spec_from_gguf(file: GGUFFile) -> TokenizerSpec:
    """The tokenizer of a GGUF file. Raises CheckpointError on a way of splitting text that is not known."""
    pre = file.field("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(f"{file.path}: pre-tokenizer {pre!r} is not one of {sorted(PRE_TOKENIZERS)}")
    tokens: list[str] = file.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in file.field("tokenizer.ggml.merges")]
    special_ids = [
        i for i, kind in enumerate(file.field("tokenizer.ggml.token_type")) if kind == CONTROL_TOKEN
    ]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special_ids])
    return TokenizerSpec(
        backend.to_str(),
        special_ids,
        file.field("tokenizer.chat_template"),
        tokens[file.field("tokenizer.ggml.bos_token_id")],
        tokens[file.field("tokenizer.ggml.eos_token_id")],
    )


class TextTokenizer:
    """The tokenizer of one model. Safe to use from several threads."""

    def __init__(self, spec: TokenizerSpec):
        self._backend = Tokenizer.from_str(spec.backend)
        self.special_ids = frozenset(spec.special_ids)
        self._token_bytes = _byte_table(self._backend, self.special_ids)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(spec.chat_template, globals={"raise_exception": _refuse})
        self.chat_template, self.bos_token, self.eos_token = (
            spec.chat_template,
            spec.bos_token,
            spec.eos_token,
        )
        self._template_names = {"bos_token": spec.bos_token, "eos_token": spec.eos_token}

    @property
    def vocab_size(self) -> int:
        return len(self._token_bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Special tokens written out in the text become themselves."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation with the assistant's turn opened.

        Raises ChatTemplateError when the template refuses the messages.
        """
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, **self._template_names
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        return self._token_bytes[token_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of some tokens, special ones left out, bytes that are no UTF-8 replaced."""
        stream = TextStream(self)
        return stream.push(token_ids) + stream.finish()


class TextStream:
    """Turns tokens into text as they come; bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        special = self._tokenizer.special_ids
        data = b"".join(self._tokenizer.token_bytes(i) for i in token_ids if i not in special)
        return self._decoder.decode(data)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _byte_table(backend: Tokenizer, special_ids: frozenset[int]) -> list[bytes]:
    """Bytes of every token id, undoing the byte-to-printable-character map of GPT-2's byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    character_to_byte = {chr(b): b for b in printable}
    character_to_byte |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    table: list[bytes] = []
    for token_id in range(backend.get_vocab_size()):
        token = backend.id_to_token(token_id)
        assert token is not None, f"the vocabulary has a hole at {token_id}"
        if token_id in special_ids or any(character not in character_to_byte for character in token):
            table.append(token.encode())
        else:
            table.append(bytes(character_to_byte[character] for character in token))
    return table


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
