"""How a text would be routed: run it once, learn nothing, keep the queries of one layer.

T tokens, D key size.
"""

import asyncio

import numpy as np

from keystore.records import Float32Array
from model.keys import KeyView
from model.sampling import SamplingParams
from server.engine.sequence import Lesson
from server.generation import GenerationRequest
from server.registry import Endpoint, Watched


async def trace_queries(
    endpoint: Endpoint, layer: int, token_ids: tuple[int, ...], request_id: str, keys: KeyView
) -> Float32Array:
    """Queries (T, D) of a plastic layer, with `keys` in force in every layer below.

    Raises as Endpoint.start and Generation.deltas do.
    """
    watch = QueryWatch(layer, len(token_ids), asyncio.get_running_loop())
    request = GenerationRequest(
        request_id=request_id,
        # The engine traces tokens that have a next one, so the text gets one more.
        prompt_token_ids=(*token_ids, endpoint.eos_token_id),
        params=SamplingParams(max_tokens=1, temperature=0.0),
        plasticity="off",
    )
    (generation,) = endpoint.start_watched(Watched(request, keys, watch))
    try:
        async for _ in generation.deltas():
            pass
        return await watch.complete
    finally:
        generation.cancel()


class QueryWatch:
    """Takes lessons in on the engine's thread until every token has been seen."""

    def __init__(self, layer: int, tokens: int, loop: asyncio.AbstractEventLoop):
        self.complete: asyncio.Future[Float32Array] = loop.create_future()
        self._layer = layer
        self._missing = tokens
        self._loop = loop
        self._rows: list[Float32Array] = []

    def __call__(self, lesson: Lesson) -> None:
        queries = lesson.trace.by_layer[self._layer].queries.numpy(force=True)[: self._missing]
        self._rows.append(queries.copy())
        self._missing -= len(queries)
        if self._missing == 0:
            self._loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        if not self.complete.done():
            self.complete.set_result(np.concatenate(self._rows))
