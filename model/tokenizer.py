"""Text to token ids and back, chat messages to a prompt."""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from model.chat_template import ChatTemplate
from model.checkpoints.gguf import GGUFFile
from model.errors import ChatTemplateError, CheckpointError
from model.token_bytes import byte_table, strips_leading_space

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
    chat_template: str  # empty: there is none
    bos_token: str  # empty: there is none
    eos_token: str


def spec_from_gguf(file: GGUFFile) -> TokenizerSpec:
    """The tokenizer of a GGUF file. Raises CheckpointError on a way of splitting text that is not known."""
    pre = file.text("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(f"{file.path}: pre-tokenizer {pre!r} is not one of {sorted(PRE_TOKENIZERS)}")
    tokens = file.items("tokenizer.ggml.tokens", str)
    cut = (merge.partition(" ") for merge in file.items("tokenizer.ggml.merges", str))
    merges = [(left, right) for left, _, right in cut]
    kinds = file.items("tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.token_type has {len(kinds)} kinds for {len(tokens)} tokens"
        )
    special_ids = [i for i, kind in enumerate(kinds) if kind == CONTROL_TOKEN]
    try:
        backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file.path}: its vocabulary is none: {str(error)[:200]}") from error
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special_ids])
    return TokenizerSpec(
        backend.to_str(),
        special_ids,
        file.text("tokenizer.chat_template", ""),
        *(_named_token(file, tokens, name) for name in ("bos", "eos")),
    )


def _named_token(file: GGUFFile, tokens: list[str], name: str) -> str:
    field = f"tokenizer.ggml.{name}_token_id"
    token_id = file.count(field, lowest=0)
    if token_id >= len(tokens):
        raise CheckpointError(f"{file.path}: {field} is {token_id}; allowed: 0 to {len(tokens) - 1}")
    return tokens[token_id]


class TextTokenizer:
    """The tokenizer of one model. Safe to use from several threads."""

    def __init__(self, spec: TokenizerSpec, vocab_size: int = 0):
        """`vocab_size`: of the model, where it has more ids than the tokenizer has texts.

        Raises CheckpointError when the tokenizer is of a kind that is not known, or the chat template is none.
        """
        self._backend = Tokenizer.from_str(spec.backend)
        self.special_ids = frozenset(spec.special_ids)
        self._token_bytes = byte_table(self._backend, vocab_size)
        self._strips_space = strips_leading_space(self._backend)
        self._template = ChatTemplate(spec.chat_template) if spec.chat_template else None
        self.chat_template, self.bos_token, self.eos_token = (
            spec.chat_template,
            spec.bos_token,
            spec.eos_token,
        )
        self._template_names = {"bos_token": spec.bos_token, "eos_token": spec.eos_token}

    @property
    def vocab_size(self) -> int:
        return len(self._token_bytes)

    @property
    def begins_texts(self) -> bool:
        """Whether `encode` puts special tokens around a text."""
        return bool(self.encode("", add_special_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, if wanted with what the tokenizer puts around a whole one.

        Special tokens written out in the text become themselves.
        """
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation with the assistant's turn opened.

        Raises ChatTemplateError when the template refuses the messages.
        """
        if self._template is None:
            raise ChatTemplateError("this model has no chat template; use completions")
        text = self._template.render(messages, **self._template_names)
        return self.encode(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        return self._token_bytes[token_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of some tokens, special ones left out, bytes that are no UTF-8 replaced."""
        stream = TextStream(self)
        text = stream.push(token_ids) + stream.finish()
        return text.removeprefix(" ") if self._strips_space else text


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
