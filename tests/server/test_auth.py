"""Who gets in where. A new route fails here until it has a row."""

from collections.abc import Callable, Iterator

import httpx
import pytest

from server.auth import ApiKey, ApiKeys
from server.refusals import Unauthenticated

ROWS = """
GET  /health                                   public
GET  /health/live                              public
GET  /health/ready                             public
GET  /metrics                                  user
GET  /openapi.json                             user
GET  /v1/models                                user
GET  /v1/models/{model}                        user
POST /v1/completions                           user
POST /v1/chat/completions                      user
POST /v1/feedback                              user
POST /{endpoint}/v1/feedback                   user
GET  /{endpoint}/v1/models                     user
GET  /{endpoint}/v1/models/{model}             user
POST /{endpoint}/v1/completions                user
POST /{endpoint}/v1/chat/completions           user
POST /tokenize                                 user
POST /detokenize                               user
GET  /tokenizer_info                           user
POST /{endpoint}/tokenize                      user
POST /{endpoint}/detokenize                    user
GET  /{endpoint}/tokenizer_info                user
GET  /v1/keys                                  user
GET  /v1/keys/{endpoint}                       user
GET  /v1/keys/{endpoint}/layers/{layer}        user
GET  /v1/keys/{endpoint}/versions              user
GET  /v1/keys/{endpoint}/usage                 user
POST /v1/keys/{endpoint}/layers/{layer}/search user
GET  /v1/keys/{endpoint}/layers/{layer}/projection user
GET  /v1/keys/{endpoint}/layers/{layer}/experts/{expert} user
GET  /v1/keys/{endpoint}/events                user
POST /admin/keys/{endpoint}/freeze             admin
POST /admin/keys/{endpoint}/unfreeze           admin
POST /admin/keys/{endpoint}/rollback           admin
POST /admin/keys/{endpoint}/reset              admin
POST /admin/keys/{endpoint}/consolidate        admin
POST /admin/keys/{endpoint}/snapshot           admin
POST /admin/keys/{endpoint}/restore            admin
GET  /admin/keys/{endpoint}/audit              admin
POST /admin/experts/{endpoint}                 admin
GET  /admin/experts/{endpoint}                 admin
POST /admin/experts/{endpoint}/{name}/promote  admin
DELETE /admin/experts/{endpoint}/{name}        admin
"""
MATRIX = [tuple(row.split()) for row in ROWS.strip().splitlines()]
LEVELS = ("public", "user", "admin")
HEADERS = {
    "public": {},
    "user": {"Authorization": "Bearer alice-key"},
    "admin": {"Authorization": "Bearer root-key"},
}


@pytest.fixture(scope="module")
def guarded(serve, tmp_path_factory) -> Iterator:
    api_keys = ApiKeys(
        [
            ApiKey.of("alice-key", "alice", "user"),
            ApiKey.of("bob-key", "bob", "user"),
            ApiKey.of("root-key", "ops", "admin"),
        ]
    )
    with serve(tmp_path_factory.mktemp("guarded"), api_keys=api_keys, public_metrics=False) as running:
        yield running


@pytest.fixture(scope="module")
def opened(guarded, listening) -> Iterator[Callable[..., httpx.Response]]:
    """opened(method, path, headers): an answer of which a stream's end is not waited for."""
    with listening(guarded.app) as url, httpx.Client(base_url=url) as client:

        def begin(method: str, path: str, headers: dict[str, str]) -> httpx.Response:
            with client.stream(method, path, headers=headers) as response:
                if response.status_code != 200:
                    response.read()
                return response

        yield begin


def routes_of(app):
    found = set()
    for path, methods in app.openapi()["paths"].items():
        found |= {(method.upper(), path) for method in methods}
    return found | {("GET", app.openapi_url)}


def filled(path):
    return (
        path.replace("{endpoint}", "some")
        .replace("{model}", "some")
        .replace("{layer}", "2")
        .replace("{expert}", "1")
        .replace("{name}", "nobody")
    )


def test_every_route_has_its_row_in_the_matrix(guarded):
    assert routes_of(guarded.app) == {(method, path) for method, path, _ in MATRIX}


def test_no_route_hides_from_the_openapi_description(guarded):
    served = set()
    pending = list(guarded.app.router.routes)
    while pending:
        route = pending.pop()
        inner = getattr(route, "original_router", None) or getattr(route, "router", None)
        if inner is not None and not hasattr(route, "methods"):
            pending += inner.routes
        elif hasattr(route, "methods"):
            served |= {(method, route.path) for method in route.methods - {"HEAD"}}
    assert served == {(method, path) for method, path, _ in MATRIX}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("method", "path", "needed"), MATRIX)
def test_each_route_answers_to_the_right_keys_only(guarded, opened, method, path, needed, level):
    ask = opened if path.endswith("/events") else guarded.request
    response = ask(method, filled(path), headers=HEADERS[level])
    if LEVELS.index(level) >= LEVELS.index(needed):
        assert response.status_code not in (401, 403)
    elif level == "public":
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"
    else:
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "insufficient_permissions"


@pytest.mark.parametrize(
    "path", ["/nothing", "/admin/nothing", "/docs", "/redoc", "/health/", "/HEALTH", "/health/live/x"]
)
def test_paths_that_do_not_exist_are_not_public(guarded, path):
    assert guarded.get(path).status_code == 401


@pytest.mark.parametrize(
    "header", ["Bearer nonsense", "Bearer ", "Bearer", "Basic alice-key", "alice-key", "Bearer alice-key2"]
)
def test_a_wrong_key_does_not_get_in(guarded, header):
    response = guarded.get("/v1/models", headers={"Authorization": header})
    assert response.status_code == 401
    assert "alice" not in response.text


def test_a_body_is_not_read_before_the_key_is_known(guarded):
    response = guarded.request("POST", "/v1/completions", content=b"x" * 5_000_000)
    assert response.status_code == 401


@pytest.mark.parametrize("scope", ["tenant:bob", "session:bob/s", "tenant:nobody"])
def test_a_user_sees_only_scopes_of_its_own_tenant(guarded, scope):
    for path in (
        "/v1/keys",
        "/v1/keys/some",
        "/v1/keys/some/layers/2",
        "/v1/keys/some/versions",
        "/v1/keys/some/events",
    ):
        response = guarded.get(path, params={"scope": scope}, headers=HEADERS["user"])
        assert response.status_code == 403, path
    search = guarded.post(
        "/v1/keys/some/layers/2/search", {"text": "x"}, params={"scope": scope}, headers=HEADERS["user"]
    )
    assert search.status_code == 403


def test_own_scopes_the_anchors_and_an_admins_view_are_allowed(guarded):
    for scope in ("tenant:alice", "session:alice/s", "anchor"):
        shown = guarded.get("/v1/keys/some", params={"scope": scope}, headers=HEADERS["user"])
        assert shown.json()["scope"] == scope
    assert guarded.get("/v1/keys/some", headers=HEADERS["user"]).json()["scope"] == "tenant:alice"
    assert (
        guarded.get("/v1/keys/some", params={"scope": "tenant:bob"}, headers=HEADERS["admin"]).status_code
        == 200
    )


def test_requests_learn_for_the_tenant_of_their_key(guarded):
    body = {"model": "some", "prompt": "abc", "max_tokens": 1, "session_id": "s1"}
    answer = guarded.post("/v1/completions", body, headers=HEADERS["user"]).json()
    assert answer["libration"]["scope"] == "session:alice/s1"


def test_without_keys_everybody_is_the_default_admin():
    caller = ApiKeys().identify(None)
    assert (caller.tenant, caller.level) == ("default", "admin")


def test_keys_are_kept_as_digests():
    api_key = ApiKey.of("secret", "t", "user")
    assert "secret" not in repr(api_key)
    with pytest.raises(Unauthenticated):
        ApiKeys([api_key]).identify("Bearer secret2")
