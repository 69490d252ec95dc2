"""The key space, read only: which keys an endpoint routes by, where they are and how they came there."""

import io
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request, Response

from keystore.canary import CanaryReading
from keystore.projection import nearest_neighbours
from keystore.records import Float32Array, ScopeId
from keystore.snapshot import KeySnapshot
from server.exchange import caller_of
from server.keyspace import (
    LayerReading,
    SortField,
    layer_columns,
    load_of_layer,
    ranked_experts,
    read_layers,
    usage_share,
    visible_experts,
)
from server.refusals import NotFound
from server.registry import Endpoint, Plasticity
from server.routes.lookup import routing_keys_of, visible_scope
from server.routes.wire import StrictJsonRoute, json_response
from server.schemas.answers import answers
from server.schemas.key_answers import KeySpaceDetail, KeySpaceList, LayerExperts, UsageMatrix, VersionList
from server.state import state_of

router = APIRouter(prefix="/v1/keys", route_class=StrictJsonRoute)

Scope = Annotated[str | None, Query(max_length=300)]
Session = Annotated[str | None, Query(max_length=128)]
Version = Annotated[int | None, Query(ge=0, le=2**53)]
Offset = Annotated[int, Query(ge=0, le=1_000_000)]
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("", responses=answers(KeySpaceList))
def list_key_spaces(request: Request, scope: Scope = None, session_id: Session = None) -> Response:
    """Endpoints with routing keys, and where the scope's keys stand in each."""
    caller, served = caller_of(request), state_of(request).registry.endpoints.values()
    data = [
        _summary(each, each.plasticity, visible_scope(caller, each.plasticity, scope, session_id))
        for each in served
        if each.plasticity is not None
    ]
    return json_response({"object": "list", "data": data})


@router.get("/{endpoint}", responses=answers(KeySpaceDetail))
def show_key_space(
    request: Request, endpoint: str, scope: Scope = None, session_id: Session = None, version: Version = None
) -> Response:
    """One endpoint, layer by layer."""
    served, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    seen = visible_scope(caller_of(request), plasticity, scope, session_id)
    view = plasticity.store.view(seen, version)
    readings = read_layers(plasticity.store, view)
    return json_response(
        _summary(served, plasticity, seen, version)
        | {
            "versions_kept": len(plasticity.store.versions(seen)),
            "checksum": view.checksum,
            "tokens": view.tokens,
            "trust_radius": plasticity.store.gravity.for_scope(seen).trust_radius,
            "canary": _canary(plasticity.store.canary_readings().get(seen)),
            "layers": [_layer(served, view, layer, reading) for layer, reading in readings.items()],
        }
    )


@router.get("/{endpoint}/layers/{layer}", responses=answers(LayerExperts))
def show_layer(
    request: Request,
    endpoint: str,
    layer: int,
    scope: Scope = None,
    session_id: Session = None,
    version: Version = None,
    sort: SortField = "usage",
    order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    offset: Offset = 0,
    limit: Limit = 100,
) -> Response:
    """One layer, expert by expert.

    Usage and idle time are the whole process's since its start, the rest is the scope's. `idle_s` is null for an expert
    that has not been selected yet; sorted, it comes before all others.
    """
    served, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    seen = visible_scope(caller_of(request), plasticity, scope, session_id)
    view = plasticity.store.view(seen, version)
    keys = keys_of_layer(view, layer)
    columns = layer_columns(served, plasticity.store, view, layer)
    visible = visible_experts(view, layer)
    ranked = ranked_experts(columns, keys, visible, sort, falling=order == "desc")
    page = ranked[offset : offset + limit].tolist()
    nearest, distances = nearest_neighbours(keys[visible], np.searchsorted(visible, page).tolist())
    experts: list[dict[str, Any]] = [
        columns.row(expert)
        | {
            "nearest": {"expert": int(visible[nearest[i]]), "distance": float(distances[i])}
            if nearest[i] >= 0
            else None,
        }
        for i, expert in enumerate(page)
    ]
    return json_response(
        {
            "endpoint": endpoint,
            "layer": layer,
            "scope": str(seen),
            "version": view.version,
            "plastic": layer in view.usage,
            "num_experts": len(visible),
            "sort": sort,
            "order": order,
            "offset": offset,
            "experts": experts,
        }
    )


@router.get("/{endpoint}/versions", responses=answers(VersionList))
def list_versions(
    request: Request,
    endpoint: str,
    scope: Scope = None,
    session_id: Session = None,
    offset: Offset = 0,
    limit: Limit = 100,
) -> Response:
    """The scope's own kept versions, newest first. Version 0, the anchors, is always there and not listed."""
    _, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    seen = visible_scope(caller_of(request), plasticity, scope, session_id)
    rows = plasticity.store.versions(seen)
    data: list[dict[str, Any]] = [
        {
            "version": row.version,
            "parent": row.parent,
            "created_at": row.created_at,
            "tokens": row.tokens,
            "drift": {"max": row.drift_max, "mean": row.drift_mean},
            "checksum": row.checksum,
            "reason": row.reason,
        }
        for row in rows[offset : offset + limit]
    ]
    return json_response(
        {"object": "list", "endpoint": endpoint, "scope": str(seen), "total": len(rows), "data": data}
    )


@router.get("/{endpoint}/usage", responses=answers(UsageMatrix, {"application/zip": "with `format=npz`"}))
def show_usage(
    request: Request, endpoint: str, form: Annotated[Literal["json", "npz"], Query(alias="format")] = "json"
) -> Response:
    """Tokens per phase, layer and expert since the start of the process: the matrix behind the metrics.

    0 for experts that a caller who is no admin does not see.
    As npz: `counts` (phases, layers, experts) and `layers`, which `numpy.load` reads without pickle.
    """
    served, caller = state_of(request).registry.get(endpoint), caller_of(request)
    usage = served.usage
    if usage is None:
        raise NotFound(f"the endpoint {endpoint!r} has no experts")
    counts = usage.counts.copy()
    if served.plasticity is not None and caller.level != "admin":
        view = served.plasticity.store.view(served.plasticity.scope_of(caller.tenant))
        for i, layer in enumerate(usage.layers):
            counts[:, i, np.setdiff1d(np.arange(counts.shape[2]), visible_experts(view, layer))] = 0
    if form == "npz":
        file = io.BytesIO()
        np.savez_compressed(file, counts=counts, layers=np.array(usage.layers))
        return Response(file.getvalue(), media_type="application/zip")
    return json_response(
        {
            "endpoint": endpoint,
            "phases": usage.PHASES,
            "layers": usage.layers,
            "num_experts": counts.shape[2],
            "num_experts_per_tok": usage.num_experts_per_tok,
            "counts": counts,
        }
    )


def keys_of_layer(view: KeySnapshot, layer: int) -> Float32Array:
    """The keys (M, D) of a layer. Raises NotFound."""
    if layer not in view.indexes:
        raise NotFound(
            f"layer {layer} has no routing keys; allowed: {', '.join(map(str, view.indexes))}", "layer"
        )
    return view.keys_of(layer)


def _summary(
    endpoint: Endpoint, plasticity: Plasticity, scope: ScopeId, version: int | None = None
) -> dict[str, Any]:
    store = plasticity.store
    view = store.view(scope, version)
    readings = read_layers(store, view)
    plastic = [readings[layer] for layer in view.usage]
    drift = {
        "max": max((each.drift_max for each in plastic), default=0.0),
        "mean": sum(each.drift_mean for each in plastic) / max(1, len(plastic)),
    }
    return {
        "endpoint": endpoint.name,
        "scope": str(scope),
        "version": view.version,
        "plasticity": plasticity.default,
        "frozen": store.is_frozen(scope),
        "plastic_layers": list(view.usage),
        "drift": drift,
    }


def _canary(reading: CanaryReading | None) -> dict[str, Any] | None:
    """How the scope's newest judged version did; None before the first."""
    if reading is None:
        return None
    return {
        "version": reading.version,
        "at": reading.at,
        "passed": reading.passed,
        "loss_nats": reading.loss_nats,
        "anchors_loss_nats": reading.anchors_loss_nats,
        "loss_increase": reading.loss_increase,
        "overlap": reading.overlap,
    }


def _layer(endpoint: Endpoint, view: KeySnapshot, layer: int, reading: LayerReading) -> dict[str, Any]:
    visible = visible_experts(view, layer)
    load, balance = load_of_layer(endpoint, layer, visible)
    return {
        "layer": layer,
        "plastic": layer in view.usage,
        "num_experts": len(visible),
        "drift": {"max": reading.drift_max, "mean": reading.drift_mean, "moved": reading.moved},
        "min_distance": reading.min_distance,
        "tokens": int(load.sum()),
        "largest_share": float(usage_share(load).max()),
        "entropy_ratio": balance.entropy_ratio,
        "jain_index": balance.jain_index,
    }
