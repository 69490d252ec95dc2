"""One expert and its history, and a layer as a picture: coordinates of every key in a plane that never changes."""

from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from keystore.errors import KeyVersionUnavailable
from keystore.projection import Plane, layer_drift
from keystore.records import Int64Array, ScopeId
from keystore.store import KeyStore
from server.exchange import caller_of
from server.keyspace import anchors_of, born_experts, layer_columns, visible_experts
from server.refusals import NotFound
from server.registry import Endpoint
from server.routes.keys import Limit, Scope, Session, Version, keys_of_layer
from server.routes.lookup import routing_keys_of, visible_scope
from server.routes.wire import StrictJsonRoute, json_response
from server.schemas.answers import answers
from server.schemas.key_answers import Expert, Projection
from server.state import state_of

router = APIRouter(prefix="/v1/keys", route_class=StrictJsonRoute)

NEIGHBOURS = 8
PEERS = 8


@router.get("/{endpoint}/layers/{layer}/projection", responses=answers(Projection))
def project_layer(
    request: Request,
    endpoint: str,
    layer: int,
    scope: Scope = None,
    session_id: Session = None,
    version: Version = None,
) -> Response:
    """Anchors and keys in the plane in which the anchors differ most; the same plane for every version."""
    _, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    seen = visible_scope(caller_of(request), plasticity, scope, session_id)
    view = plasticity.store.view(seen, version)
    keys = keys_of_layer(view, layer)
    anchors = anchors_of(plasticity.store)[layer]
    plane = Plane.of(anchors[: born_experts(plasticity.store, layer)])
    visible = visible_experts(view, layer)
    return json_response(
        {
            "endpoint": endpoint,
            "layer": layer,
            "scope": str(seen),
            "version": view.version,
            "explained": plane.explained,
            "expert_ids": visible,
            "anchors": plane.project(anchors[visible]),
            "keys": plane.project(keys[visible]),
        }
    )


@router.get("/{endpoint}/layers/{layer}/experts/{expert}", responses=answers(Expert))
def show_expert(
    request: Request,
    endpoint: str,
    layer: int,
    expert: int,
    scope: Scope = None,
    session_id: Session = None,
    version: Version = None,
    limit: Limit = 64,
) -> Response:
    """One expert: its load, where its key is, who is near, and how it moved over the scope's kept versions.

    Its peers are the experts that worked on the same tokens most often, of the newest that the layer routed.
    """
    served, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    store = plasticity.store
    seen = visible_scope(caller_of(request), plasticity, scope, session_id)
    view = store.view(seen, version)
    keys = keys_of_layer(view, layer)
    visible = visible_experts(view, layer)
    if expert not in visible:
        raise NotFound(
            f"layer {layer} has no expert {expert} for {seen}; it has {len(visible)}, up to {visible[-1]}",
            "expert",
        )
    columns = layer_columns(served, store, view, layer)
    distances = np.linalg.norm(keys.astype(np.float64) - keys[expert], axis=1)
    closest = visible[np.argsort(distances[visible], kind="stable")]
    nearest = [int(each) for each in closest if each != expert][:NEIGHBOURS]
    return json_response(
        {
            "endpoint": endpoint,
            "layer": layer,
            "scope": str(seen),
            "version": view.version,
            "plastic": layer in view.usage,
            **columns.row(expert),
            "nearest": [{"expert": each, "distance": float(distances[each])} for each in nearest],
            "coactivated": _coactivated(served, layer, expert, visible),
            "history": _history(store, seen, layer, expert, limit),
        }
    )


def _coactivated(endpoint: Endpoint, layer: int, expert: int, expert_ids: Int64Array) -> dict[str, Any]:
    """Who of these experts worked with one of them, most often first."""
    assert endpoint.usage is not None, endpoint.name
    window_tokens, tokens, together = endpoint.usage.recent[layer].together_with(expert)
    ranked = expert_ids[np.argsort(-together[expert_ids], kind="stable")][:PEERS].tolist()
    peers = [(each, int(together[each])) for each in ranked if together[each]]
    return {
        "window_tokens": window_tokens,
        "tokens": tokens,
        "peers": [{"expert": peer, "tokens": n, "share": n / tokens} for peer, n in peers],
    }


def _history(store: KeyStore, scope: ScopeId, layer: int, expert: int, limit: int) -> list[dict[str, Any]]:
    """Drift of one key in the scope's kept versions, newest first; a version thinned out meanwhile is left out."""
    anchor, radius = (
        anchors_of(store)[layer][expert : expert + 1],
        store.gravity.for_scope(scope).trust_radius,
    )
    history: list[dict[str, Any]] = []
    for row in store.versions(scope)[:limit]:
        try:
            key = store.view(scope, row.version).keys_of(layer)[expert : expert + 1]
        except KeyVersionUnavailable:
            continue
        drift = layer_drift(anchor, key, radius)
        history.append(
            {"version": row.version, "drift": float(drift.relative[0]), "drift_of_radius": drift.max}
        )
    return history
