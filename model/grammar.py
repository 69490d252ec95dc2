"""Texts that fit a JSON schema, token by token. llguidance does the work; this says what is asked of it, and of whom.

A compiled grammar and the texts begun with it share one lexer, which grows with what they write and has a bound: a
grammar that reached it is `exhausted` and begins no more texts. V vocabulary.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from model.errors import GrammarExhausted, InvalidGrammar
from model.tokenizer import TextTokenizer

# Work, not time, so that the same schema is always taken or always refused. A mask takes at most about 20 ms.
LIMITS: Any = {  # Any: names and numbers of the library's
    "initial_lexer_fuel": 300_000,  # about 0.4 s
    "max_grammar_size": 200_000,  # symbols
    "step_lexer_fuel": 100_000,  # for one mask
    "step_max_items": 20_000,  # for one mask
    "max_lexer_states": 20_000,  # about 0.5 KiB each
}
OPTIONS: Any = {  # Any: the library's type lacks two of its own names. All are given: a schema must not set them
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r"\n? {0,16}",  # bounded: a small model would go on with spaces for ever
    "coerce_one_of": False,
    "lenient": False,  # a keyword that cannot be kept is an error
}
SHOWN_CHARS = 300
# What the library says without naming the keyword that it is about.
UNNAMED = (
    ("regex parse error", "pattern"),
    ("multiple of", "multipleOf"),
    ("format", "format"),
    ("Invalid type", "type"),
    ("Pointer", "$ref"),
    ("retriev", "$ref"),
)


class GrammarState:
    """How far one text has come."""

    def __init__(self, grammar: "Grammar", matcher: LLMatcher):
        self._grammar = grammar
        self._matcher = matcher

    def constrain(self, logits: Tensor) -> Tensor:
        """Logits (V) with -inf for every token that cannot come next; a new tensor. Raises GrammarExhausted."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").view(np.bool_)
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)

    def accept(self, token_id: int) -> None:
        """The text goes on with this token, or ends with it. Raises GrammarExhausted."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            self._grammar.exhausted = True
            raise GrammarExhausted(_told(self._matcher))


class Grammar:
    """A compiled schema. Texts may be begun with it from any thread."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher
        self.exhausted = False

    def begin(self) -> GrammarState:
        return GrammarState(self, self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles schemas for one vocabulary and the token that ends a text."""

    def __init__(self, tokenizer: TextTokenizer, eos_token_id: int):
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, eos_token_id)))

    def compile(self, schema: Mapping[str, Any]) -> Grammar:  # Any: JSON
        """A grammar of the JSON texts that fit the schema.

        Recurses as deep as the schema is nested, references followed: about 16 KiB of stack a level. Raises
        InvalidGrammar, naming the keyword, for a schema that is wrong, cannot be kept or is too large.
        """
        source = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=OPTIONS)
        matcher = LLMatcher(
            self._tokenizer, source, log_level=0, limits=LLParserLimits(**LIMITS, verbose_errors=False)
        )
        matcher.compute_bitmask()  # some faults only show in use: endless references, too many choices at once
        if matcher.is_error():
            raise InvalidGrammar(_told(matcher))
        return Grammar(matcher)


class _Vocabulary:
    """What the library wants to know of a tokenizer."""

    def __init__(self, tokenizer: TextTokenizer, eos_token_id: int):
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.tokens: Sequence[bytes] = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        names = "|".join(re.escape(self.tokens[i].decode()) for i in self.special_token_ids)
        self._specials = re.compile(f"(?={names})" if names else r"(?!)")

    def __call__(self, text: bytes) -> list[int]:
        """Token ids of a text in which special tokens are only text: each is cut after its first character."""
        whole = text.decode()
        cuts = [0, *(match.start() + 1 for match in self._specials.finditer(whole)), len(whole)]
        pieces = (whole[first:last] for first, last in pairwise(cuts))
        return [token_id for piece in pieces for token_id in self._tokenizer.encode(piece)]


def _told(matcher: LLMatcher) -> str:
    """The library's message, short, with the keyword that it is about."""
    message = matcher.get_error().removesuffix("<non-verbose/>").strip()[:SHOWN_CHARS]
    if message == "NoExtensionBias":
        return "no text fits it"
    keyword = next((name for words, name in UNNAMED if words in message and name not in message), None)
    return message if keyword is None else f"{keyword}: {message}"
