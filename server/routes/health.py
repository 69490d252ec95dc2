"""Is it alive, is it ready, what are its numbers. Alive means that the engines beat, not just HTTP."""

import time

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse

from server.metrics import CONTENT_TYPE
from server.refusals import NotServing
from server.routes.wire import json_response
from server.schemas.answers import Health, Liveness, Readiness, answers
from server.state import ServerState, state_of

router = APIRouter()

MISSED_BEATS = 3


@router.get("/health/live", responses=answers(Liveness))
async def live(request: Request) -> Response:
    """503 when an engine has stopped or hangs: restart the process."""
    _check_live(state_of(request))
    return json_response({"status": "live"})


@router.get("/health/ready", responses=answers(Readiness))
async def ready(request: Request) -> Response:
    """503 when no new requests should come. A degraded server serves on, and says what is wrong."""
    state = state_of(request)
    _check_ready(state)
    reasons = state.degraded()
    return json_response({"status": "degraded" if reasons else "ready", "reasons": reasons})


@router.get("/health", responses=answers(Health))
async def health(request: Request) -> Response:
    """Both, with version and age."""
    state = state_of(request)
    _check_ready(state)
    reasons = state.degraded()
    return json_response(
        {
            "status": "degraded" if reasons else "ready",
            "reasons": reasons,
            "version": state.version,
            "uptime_s": round(time.time() - state.started_at, 1),
            "endpoints": list(state.registry.endpoints),
        }
    )


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    page = await run_in_threadpool(state_of(request).metrics.page)
    return Response(page, headers={"Content-Type": CONTENT_TYPE})


def _check_live(state: ServerState) -> None:
    for runner in state.registry.runners:
        if not runner.alive:
            raise NotServing("the engine is not running")
        silent_s = runner.seconds_since_beat()
        if silent_s > MISSED_BEATS * state.heartbeat_s:
            raise NotServing(f"the engine has been silent for {silent_s:.0f} s")


def _check_ready(state: ServerState) -> None:
    if any(runner.draining for runner in state.registry.runners):
        raise NotServing("the server is shutting down", draining=True)
    _check_live(state)
