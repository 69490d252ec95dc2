"""One request and its answer as the server's parts see them: its id, its caller, what the log will say."""

from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import Request
from starlette.types import Scope

from server.budgets import Budget
from server.generation import PlasticityMode

Level = Literal["public", "user", "admin"]
EXCHANGE = "exchange"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. The tenant decides whose keys are read and taught."""

    tenant: str
    level: Level
    budget: Budget | None = None  # of tokens to teach with; None: without limit
    rate: Budget | None = None  # of requests; None: without limit
    plasticity: PlasticityMode | None = None  # for requests that do not say; None: the endpoint's


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
