"""The application: routes, and the layers around every request. Starts and stops nothing."""

from http import HTTPStatus
from typing import Any, NoReturn

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from server.auth import Authentication
from server.middleware import BodyLimit, RequestContext
from server.openapi import describe, methods_at
from server.routes import (
    admin,
    experts,
    feedback,
    health,
    key_events,
    key_pictures,
    key_search,
    keys,
    openai,
    tokens,
)
from server.state import ServerState

ROUTERS = (
    health.router,
    openai.router,
    feedback.router,
    tokens.router,
    keys.router,
    key_search.router,
    key_pictures.router,
    key_events.router,
    admin.router,
    experts.router,
)


def create_app(state: ServerState) -> FastAPI:
    """The ASGI application over parts that already run."""
    app = FastAPI(
        title="Libration",
        version=state.version,
        docs_url=None,  # these two pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(RequestContext, count_rejected=state.metrics.count_rejected),
            Middleware(Authentication, api_keys=state.api_keys, public_metrics=state.public_metrics),
            Middleware(BodyLimit, state.max_body_bytes, state.receive_timeout_s),
        ],
    )
    app.add_exception_handler(HTTPException, _pass_on)
    app.add_exception_handler(RequestValidationError, _pass_on)
    app.state.server = state
    app.state.listeners = set[Any]()
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = lambda: describe(app)
    return app


async def _pass_on(request: Request, error: Exception) -> NoReturn:
    """Leave every error to RequestContext, so that one place answers them all."""
    methods = methods_at(request.app, request.url.path)
    if isinstance(error, HTTPException) and error.status_code == HTTPStatus.METHOD_NOT_ALLOWED and methods:
        error.headers = {"Allow": ", ".join(methods)}
    raise error
