"""Changing keys by hand: freeze, roll back, reset, consolidate, snapshot, restore; the audit trail. Under /admin/, which only admins reach."""

from pathlib import Path

from fastapi import APIRouter, Request, Response

from keystore.records import ScopeId
from server.exchange import caller_of
from server.refusals import InvalidRequest, NotFound
from server.registry import Plasticity
from server.routes.keys import Limit, Scope
from server.routes.lookup import named_scope, routing_keys_of, visible_scope
from server.routes.wire import StrictJsonRoute, json_response
from server.schemas.answers import answers
from server.schemas.key_answers import AuditTrail, Consolidated, Frozen, NewVersion, Snapshot
from server.schemas.keys import (
    ConsolidateBody,
    FreezeBody,
    ResetBody,
    RestoreBody,
    RollbackBody,
    SnapshotBody,
)
from server.state import state_of

STEP_TIMEOUT_S = 10.0

router = APIRouter(prefix="/admin/keys", route_class=StrictJsonRoute)


@router.post("/{endpoint}/freeze", responses=answers(Frozen))
def freeze(request: Request, endpoint: str, body: FreezeBody | None = None) -> Response:
    """Stop learning of one scope, or of all without one."""
    return _set_frozen(request, endpoint, body or FreezeBody(), frozen=True)


@router.post("/{endpoint}/unfreeze", responses=answers(Frozen))
def unfreeze(request: Request, endpoint: str, body: FreezeBody | None = None) -> Response:
    """Undo a freeze of the same scope."""
    return _set_frozen(request, endpoint, body or FreezeBody(), frozen=False)


@router.post("/{endpoint}/rollback", responses=answers(NewVersion))
def rollback(request: Request, endpoint: str, body: RollbackBody) -> Response:
    """Publish an old version's keys as a new version."""
    plasticity, scope = _target(request, endpoint, body.scope)
    version = plasticity.store.rollback(scope, body.to_version, if_version=body.if_version)
    return json_response({"endpoint": endpoint, "scope": str(scope), "version": version})


@router.post("/{endpoint}/reset", responses=answers(NewVersion))
def reset(request: Request, endpoint: str, body: ResetBody | None = None) -> Response:
    """Publish the anchors as a new version."""
    wanted = body or ResetBody()
    plasticity, scope = _target(request, endpoint, wanted.scope)
    version = plasticity.store.reset(scope, if_version=wanted.if_version)
    return json_response({"endpoint": endpoint, "scope": str(scope), "version": version})


@router.post("/{endpoint}/snapshot", responses=answers(Snapshot))
def snapshot(request: Request, endpoint: str, body: SnapshotBody) -> Response:
    """Write one version to a new file in the server's folder of snapshots."""
    plasticity, scope = _target(request, endpoint, body.scope)
    folder = state_of(request).snapshots_dir
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = plasticity.store.snapshot(scope, body.version, _snapshot_file(folder, body.name))
    shown = {"endpoint": endpoint, "scope": str(scope), "version": written.version, "name": body.name}
    return json_response(shown | {"checksum": written.checksum})


@router.post("/{endpoint}/restore", responses=answers(NewVersion))
def restore(request: Request, endpoint: str, body: RestoreBody) -> Response:
    """Publish the keys in a file of the server's folder of snapshots as a new version."""
    plasticity, scope = _target(request, endpoint, body.scope)
    file = _snapshot_file(state_of(request).snapshots_dir, body.name)
    if not file.is_file() or file.is_symlink():
        raise NotFound(f"there is no snapshot {body.name!r}", "name")
    version = plasticity.store.restore(scope, file, if_version=body.if_version)
    return json_response({"endpoint": endpoint, "scope": str(scope), "version": version})


@router.post("/{endpoint}/consolidate", responses=answers(Consolidated))
def consolidate(request: Request, endpoint: str, body: ConsolidateBody | None = None) -> Response:
    """Learn everything that waits, also windows that are not full, and say what was published."""
    served, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    served.runner.finish_step(STEP_TIMEOUT_S)  # an answer goes out before its lesson is taught
    plasticity.teacher.flush()
    published = plasticity.store.consolidate_once()
    versions = [{"scope": str(each.scope), "version": each.version} for each in published]
    return json_response({"endpoint": endpoint, "published": versions})


@router.get("/{endpoint}/audit", responses=answers(AuditTrail))
def show_audit(request: Request, endpoint: str, scope: Scope = None, limit: Limit = 100) -> Response:
    """What happened to a scope, or to all without one, newest first. The whole hash chain is verified first."""
    _, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    named = None if scope is None else named_scope(scope, "scope")
    verified = plasticity.store.verify_audit()
    data = plasticity.store.audit_trail(named, limit)
    shown = None if named is None else str(named)
    return json_response(
        {"object": "list", "endpoint": endpoint, "scope": shown, "verified": verified, "data": data}
    )


def _set_frozen(request: Request, endpoint: str, body: FreezeBody, *, frozen: bool) -> Response:
    _, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    scope = None if body.scope is None else named_scope(body.scope, "scope")
    store = plasticity.store
    (store.freeze if frozen else store.unfreeze)(scope)
    shown = None if scope is None else str(scope)
    return json_response({"endpoint": endpoint, "scope": shown, "frozen": store.is_frozen(scope)})


def _snapshot_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _target(request: Request, endpoint: str, scope: str | None) -> tuple[Plasticity, ScopeId]:
    _, plasticity = routing_keys_of(state_of(request).registry, endpoint)
    target = visible_scope(caller_of(request), plasticity, scope)
    if target.kind == "anchor":
        raise InvalidRequest(
            "the anchors never change; allowed: global, a tenant's or a session's scope", "scope"
        )
    return plasticity, target
