"""Which experts are closest to each token of a text, or to a point of the key space."""

from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from keystore.records import Float32Array
from keystore.snapshot import KeySnapshot
from server.exchange import caller_of, exchange_of
from server.keyspace import visible_experts
from server.refusals import InvalidRequest
from server.registry import Endpoint
from server.routes.keys import Scope, Session, Version, keys_of_layer
from server.routes.lookup import routing_keys_of, visible_scope
from server.routes.prompts import encode_text
from server.routes.streams import stop_when_left
from server.routes.wire import StrictJsonRoute, json_response
from server.routing_trace import trace_queries
from server.schemas.answers import answers
from server.schemas.key_answers import FoundExperts
from server.schemas.keys import SearchBody
from server.state import state_of

router = APIRouter(prefix="/v1/keys", route_class=StrictJsonRoute)

MAX_RESULTS = 100_000  # tokens times k


@router.post("/{endpoint}/layers/{layer}/search", responses=answers(FoundExperts))
async def search_layer(
    request: Request,
    endpoint: str,
    layer: int,
    body: SearchBody,
    scope: Scope = None,
    session_id: Session = None,
    version: Version = None,
) -> Response:
    """Scores are inner products with the scope's keys; gates are their softmax over the k asked for."""
    served, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    seen = visible_scope(caller_of(request), plasticity, scope, session_id)
    view = await run_in_threadpool(plasticity.store.view, seen, version)
    key_size = keys_of_layer(view, layer).shape[1]
    num_experts = len(visible_experts(view, layer))
    if body.k > num_experts:
        raise InvalidRequest(f"k is {body.k}; allowed: 1 to {num_experts}, the layer's experts", "k")
    if body.vector is not None:
        if len(body.vector) != key_size:
            raise InvalidRequest(f"vector has {len(body.vector)} numbers; allowed: {key_size}", "vector")
        found = _experts_of(view, layer, np.array([body.vector], dtype=np.float32), body.k)
        result: dict[str, Any] = {"experts": found[0]}
    else:
        result = {"tokens": await _search_text(request, served, view, layer, body)}
    head = {"endpoint": endpoint, "layer": layer, "scope": str(seen), "version": view.version}
    return json_response(head | result)


async def _search_text(
    request: Request, endpoint: Endpoint, view: KeySnapshot, layer: int, body: SearchBody
) -> list[dict[str, Any]]:
    if layer not in view.usage:
        raise InvalidRequest(f"layer {layer} is not plastic and can be searched by 'vector' only", "text")
    token_ids = await encode_text(endpoint, body.text or "")
    if not 0 < len(token_ids) * body.k <= MAX_RESULTS:
        raise InvalidRequest(
            f"{len(token_ids)} tokens times k = {body.k}; allowed: 1 to {MAX_RESULTS} results", "text"
        )
    work = trace_queries(endpoint, layer, token_ids, exchange_of(request).request_id, view)
    queries = await stop_when_left(request.receive, work)
    found = await run_in_threadpool(_experts_of, view, layer, queries, body.k)
    return [
        {
            "token_id": token,
            "text": endpoint.tokenizer.token_bytes(token).decode(errors="replace"),
            "experts": experts,
        }
        for token, experts in zip(token_ids, found, strict=True)
    ]


def _experts_of(view: KeySnapshot, layer: int, queries: Float32Array, k: int) -> list[list[dict[str, Any]]]:
    """Per query the k best experts. Raises NonFiniteQueries."""
    scores, expert_ids = view.search(layer, queries, k)
    weights = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    gates = weights / weights.sum(axis=1, keepdims=True)
    return [
        [{"expert": e, "score": s, "gate": g} for e, s, g in zip(ids, row, gate, strict=True)]
        for ids, row, gate in zip(expert_ids.tolist(), scores.tolist(), gates.tolist(), strict=True)
    ]
