"""Compiled response formats: made off the event loop and the engine's thread, kept for the next request like it.

Tenants share none: what one tenant's texts make of a grammar's lexer is not another's.
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import orjson

from model.errors import InvalidGrammar
from model.grammar import Grammar, GrammarCompiler
from model.tokenizer import TextTokenizer
from server.refusals import InvalidRequest, TooManyCompilations
from server.schemas.response_format import PARAM

MAX_KEPT = 32
FIRST_TIMEOUT_S = 30.0  # to read a vocabulary in, which takes about half a second
COMPILE_TIMEOUT_S = 3.0  # for a loaded machine: the limits of model/grammar.py stop most far sooner
STACK_BYTES = (
    256 * 1024 * 1024
)  # address space, for the deepest schema that is allowed; little of it is ever touched

T = TypeVar("T")
Kept = OrderedDict[tuple[str, TextTokenizer, int, bytes], Grammar]


class Grammars:
    """The grammars in use, the one used longest ago given up first. For one event loop at a time."""

    def __init__(self, timeout_s: float = COMPILE_TIMEOUT_S):
        self._timeout_s = timeout_s
        self._kept: Kept = OrderedDict()
        self._compilers: dict[tuple[TextTokenizer, int], GrammarCompiler] = {}
        self._worker: ThreadPoolExecutor | None = None

    async def get(
        self, tokenizer: TextTokenizer, eos_token_id: int, tenant: str, schema: Mapping[str, Any]
    ) -> Grammar:
        """The grammar of a schema within the limits. Raises InvalidRequest, TooManyCompilations."""
        key = (tenant, tokenizer, eos_token_id, orjson.dumps(schema))
        kept = self._kept.get(key)
        if kept is None or kept.exhausted:
            kept = await self._compiled(tokenizer, eos_token_id, schema)
            self._kept[key] = kept
        self._kept.move_to_end(key)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return kept

    async def _compiled(
        self, tokenizer: TextTokenizer, eos_token_id: int, schema: Mapping[str, Any]
    ) -> Grammar:
        self._worker = self._worker or _deep_worker()
        compiler = self._compilers.get((tokenizer, eos_token_id))
        if compiler is None:
            job = self._worker.submit(GrammarCompiler, tokenizer, eos_token_id)
            compiler = await _result(job, FIRST_TIMEOUT_S)
            self._compilers[tokenizer, eos_token_id] = compiler
        try:
            return await _result(self._worker.submit(compiler.compile, schema), self._timeout_s)
        except InvalidGrammar as error:
            raise InvalidRequest(f"{PARAM} cannot be followed: {error}", PARAM) from error


async def _result(job: Future[T], timeout_s: float) -> T:
    """What a job comes to. Raises InvalidRequest when it takes too long, TooManyCompilations when others' do."""
    waiting = asyncio.wrap_future(job)
    await asyncio.wait([waiting], timeout=timeout_s)
    if waiting.done():
        return waiting.result()
    began = job.running()
    waiting.cancel()
    if not began:
        raise TooManyCompilations("other requests' schemas are being compiled; try again later")
    raise InvalidRequest(f"{PARAM} takes too long to compile; allowed: {timeout_s:g} s", PARAM)


def _deep_worker() -> ThreadPoolExecutor:
    """One thread with a stack for deep schemas. The size can only be set for all threads that start meanwhile."""
    usual = threading.stack_size(STACK_BYTES)
    try:
        worker = ThreadPoolExecutor(1, "grammars")
        worker.submit(threading.get_ident).result()
    finally:
        threading.stack_size(usual)
    return worker
