"""What every route may ask for, handed to the application once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request

from server.auth import ApiKeys
from server.feedback import AnswerMemory
from server.grammars import Grammars
from server.metrics import Metrics
from server.registry import Registry


def _none_degraded() -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class ServerState:
    """The parts of a running server. Times are in seconds."""

    registry: Registry
    metrics: Metrics
    version: str
    system_fingerprint: str
    started_at: float  # unix seconds
    snapshots_dir: Path  # made when the first snapshot is
    experts_dir: Path  # files of experts that may be added, put there by hand
    api_keys: ApiKeys = field(default_factory=ApiKeys)
    answers: AnswerMemory = field(default_factory=AnswerMemory)
    grammars: Grammars = field(default_factory=Grammars)
    degraded: Callable[[], list[str]] = _none_degraded  # what else works badly, in words; shown by readiness
    max_body_bytes: int = 2 * 1024 * 1024
    receive_timeout_s: float = 10.0
    heartbeat_s: float = 10.0  # an engine silent for three of these is taken to hang
    public_metrics: bool = True


def state_of(request: Request) -> ServerState:
    """The state of the application that answers a request."""
    state = request.app.state.server
    assert isinstance(state, ServerState), state
    return state
