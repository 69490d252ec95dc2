"""One request and its answer as the server's parts see them: its id, its caller, what the log will say."""

from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import Request
from starlette.types import Scope

from server.learning_budget import LearningBudget

Level = Literal["public", "user", "admin"]
EXCHANGE = "exchange"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. The tenant decides whose keys are read and taught."""

    tenant: str
    level: Level
    budget: LearningBudget | None = None  # of the API key; None: it may teach without limit


@dataclass(slots=True)
class Exchange:
    """Lives as long as the request does."""

    request_id: str
    caller: Caller | None = None  # None until the API key has been checked
    facts: dict[str, str | int] = field(
        default_factory=dict[str, str | int]
    )  # for the access log, never text

    @staticmethod
    def of(scope: Scope) -> "Exchange":
        exchange = scope["state"][EXCHANGE]
        assert isinstance(exchange, Exchange), exchange
        return exchange


def exchange_of(request: Request) -> Exchange:
    return Exchange.of(request.scope)


def caller_of(request: Request) -> Caller:
    """Who is behind an authenticated request."""
    caller = Exchange.of(request.scope).caller
    assert caller is not None, request.scope["path"]
    return caller
