"""From names in a request to parts of the server, and who may see which scope."""

from typing import Annotated

from fastapi import Depends, Request

from keystore.errors import InvalidConfig
from keystore.records import ScopeId
from server.exchange import Caller
from server.refusals import Forbidden, InvalidRequest, NotFound
from server.registry import Endpoint, Plasticity, Registry, UnknownEndpoint


async def _pinned_endpoint(request: Request) -> str | None:
    return request.path_params.get("endpoint")


# The endpoint that the path names, None at the root. No query parameter: FastAPI would make one of a plain argument.
PinnedEndpoint = Annotated[str | None, Depends(_pinned_endpoint)]


def served_endpoint(registry: Registry, in_path: str | None, in_body: str | None) -> Endpoint:
    """The endpoint of the path, or else of the body. Raises UnknownEndpoint, InvalidRequest."""
    if in_path is not None:
        endpoint = registry.get(in_path)
        if in_body not in (None, in_path):
            raise UnknownEndpoint(
                f"this path serves the model {in_path!r} only; leave 'model' out or name it"
            )
        return endpoint
    if in_body is None:
        raise InvalidRequest("model is required", "model")
    return registry.get(in_body)


def routing_keys_of(registry: Registry, name: str) -> tuple[Endpoint, Plasticity]:
    """An endpoint that has routing keys. Raises UnknownEndpoint, NotFound."""
    endpoint = registry.get(name)
    if endpoint.plasticity is None:
        raise NotFound(f"the endpoint {name!r} has no routing keys")
    return endpoint, endpoint.plasticity


def visible_scope(
    caller: Caller, plasticity: Plasticity, scope: str | None, session_id: str | None = None
) -> ScopeId:
    """The scope that is asked for; by default what the caller's requests read. Raises InvalidRequest, Forbidden."""
    if scope is not None and session_id is not None:
        raise InvalidRequest("give either 'scope' or 'session_id'", "scope")
    if session_id is not None:
        return named_scope(f"session:{caller.tenant}/{session_id}", "session_id")
    read = plasticity.scope_of(caller.tenant)
    found = named_scope(scope, "scope") if scope is not None else read
    seen = found.kind == "anchor" or found.tenant == caller.tenant or found == read
    if caller.level != "admin" and not seen:
        raise Forbidden("this API key may only see the scopes of its own tenant, and what its requests read")
    return found


def named_scope(text: str, param: str) -> ScopeId:
    """Raises InvalidRequest."""
    try:
        return ScopeId.parse(text)
    except InvalidConfig as error:
        raise InvalidRequest(str(error), param) from error
