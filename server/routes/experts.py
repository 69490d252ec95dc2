"""Experts added while serving: add, watch them settle, promote, retire. Under /admin/, which only admins reach."""

from typing import Any

from fastapi import APIRouter, Request, Response

from keystore.errors import WrongGroupState
from keystore.pool import ExpertGroup
from keystore.store import KeyStore
from server.exchange import caller_of
from server.refusals import InvalidRequest, NotFound
from server.routes.lookup import routing_keys_of, visible_scope
from server.routes.wire import StrictJsonRoute, json_response
from server.schemas.answers import answers
from server.schemas.experts import AddExpertsBody
from server.schemas.key_answers import ExpertGroupList, ExpertGroupOfEndpoint
from server.state import state_of

router = APIRouter(prefix="/admin/experts", route_class=StrictJsonRoute)


@router.post("/{endpoint}", responses=answers(ExpertGroupOfEndpoint))
def add_experts(request: Request, endpoint: str, body: AddExpertsBody) -> Response:
    """Add the experts in a file of the server's folder, for one scope to settle."""
    _, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    scope = visible_scope(caller_of(request), plasticity, body.scope)
    if scope.kind not in ("tenant", "global"):
        raise InvalidRequest(
            f"experts cannot settle in {scope}; allowed: the scope of a tenant, or global", "scope"
        )
    file = state_of(request).experts_dir / body.file
    if not file.is_file() or file.is_symlink():
        raise NotFound(f"there is no file {body.file!r} in the server's folder of experts", "file")
    group = plasticity.experts.add(file, body.name, scope, body.seed)
    return json_response({"endpoint": endpoint} | _shown(plasticity.store, group))


@router.get("/{endpoint}", responses=answers(ExpertGroupList))
def list_experts(request: Request, endpoint: str) -> Response:
    """Every group that was ever added, and how far those that settle have come."""
    _, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    store = plasticity.store
    data = [_shown(store, group) for group in store.experts.all()]
    return json_response({"object": "list", "endpoint": endpoint, "data": data})


@router.post("/{endpoint}/{name}/promote", responses=answers(ExpertGroupOfEndpoint))
def promote_experts(request: Request, endpoint: str, name: str) -> Response:
    """Make where a group has settled its anchors, which everybody sees."""
    _, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    group = plasticity.store.experts.promote(name)
    return json_response({"endpoint": endpoint} | _shown(plasticity.store, group))


@router.delete("/{endpoint}/{name}", responses=answers(ExpertGroupOfEndpoint))
def retire_experts(request: Request, endpoint: str, name: str) -> Response:
    """Hide a group from everybody, for ever; running requests finish with it."""
    _, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    group = plasticity.store.experts.retire(name)
    return json_response({"endpoint": endpoint} | _shown(plasticity.store, group))


def _shown(store: KeyStore, group: ExpertGroup) -> dict[str, Any]:
    return {
        "name": group.name,
        "scope": str(group.scope),
        "state": group.state,
        "added_at": group.added_at,
        "digest": group.digest,
        "expert_ids": {str(layer): ids for layer, ids in group.expert_ids.items()},
        "settling": _settling(store, group),
    }


def _settling(store: KeyStore, group: ExpertGroup) -> dict[str, Any] | None:
    """Expert by expert, in the order of the ids. None for a group that does not settle, or no more."""
    if group.state != "settling":
        return None
    try:
        layers = store.experts.settling(group.name)
    except WrongGroupState:  # promoted or retired meanwhile
        return None
    return {
        str(layer): {
            "drift": each.drift,
            "window_drift": each.window_drift,
            "share": each.usage_share,
            "credited_tokens": each.credited_tokens,
        }
        for layer, each in layers.items()
    }
