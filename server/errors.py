"""From what went wrong to what the client is told: the only place that turns errors into HTTP.

Every answer that is not 2xx has the body `{"error": {"message", "type", "param", "code"}}`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from keystore.errors import (
    CanaryFailed,
    ExpertGroupExists,
    InvalidConfig,
    InvalidExperts,
    InvalidSnapshot,
    KeyVersionUnavailable,
    ModelMismatch,
    NonFiniteQueries,
    SnapshotExists,
    StoreUnavailable,
    UnknownExpertGroup,
    VersionConflict,
    WrongGroupState,
)
from model.errors import ChatTemplateError, InvalidExpertFile
from server import refusals
from server.engine.errors import (
    AnswerTooComplex,
    ContextLengthExceeded,
    EngineDraining,
    EngineOverloaded,
)
from server.feedback import UnknownAnswer
from server.registry import (
    FlowStepsUnavailable,
    PlasticityUnavailable,
    RoutedExpertsInvalid,
    RoutedExpertsUnavailable,
    UnknownEndpoint,
    ValueOffsetsUnavailable,
    WithinRequestUnavailable,
)

DRAIN_RETRY_S = 10
NO_RETRY = {"x-should-retry": "false"}
SHOWN_NAME_CHARS = 200


@dataclass(frozen=True, slots=True)
class Problem:
    """One error as HTTP tells it."""

    status: int
    type: str
    code: str
    message: str = ""
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def body(self) -> dict[str, Any]:  # Any: JSON
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        content = orjson.dumps(self.body())
        return Response(content, self.status, dict(self.headers), media_type="application/json")


INTERNAL = Problem(
    500,
    "server_error",
    "internal_error",
    "the server failed to answer; its log has the cause under the request id",
)


def _invalid(code: str, status: int = 400, **headers: str) -> Problem:
    return Problem(status, "invalid_request_error", code, headers=headers)


# The first entry that an error is an instance of says what becomes of it; the message is the error's own.
TABLE: tuple[tuple[type[Exception], Problem], ...] = (
    (refusals.InvalidType, _invalid("invalid_type")),
    (refusals.InvalidRequest, _invalid("invalid_value")),
    (refusals.UnsupportedParameter, _invalid("unsupported_parameter")),
    (refusals.MalformedBody, _invalid("invalid_json")),
    (refusals.Unauthenticated, Problem(401, "authentication_error", "invalid_api_key",
                                       headers={"WWW-Authenticate": "Bearer"})),
    (refusals.Forbidden, Problem(403, "permission_error", "insufficient_permissions")),
    (refusals.NotFound, _invalid("not_found", 404)),
    (refusals.BodyTooLarge, _invalid("request_too_large", 413, Connection="close")),
    (refusals.BodyTooSlow, _invalid("request_timeout", 408, Connection="close")),
    (refusals.UnsupportedMediaType, _invalid("unsupported_media_type", 415)),
    (refusals.Conflict, Problem(409, "conflict_error", "conflict", headers=NO_RETRY)),
    (refusals.OverBudget, Problem(429, "rate_limit_error", "rate_limit_exceeded")),
    (refusals.NotServing, Problem(503, "server_error", "not_ready", headers={"Retry-After": "5"})),
    (
        refusals.TooManyListeners,
        Problem(503, "server_error", "server_overloaded", headers={"Retry-After": "30"}),
    ),
    (
        refusals.TooManyCompilations,
        Problem(503, "server_error", "server_overloaded", headers={"Retry-After": "5"}),
    ),
    (ContextLengthExceeded, _invalid("context_length_exceeded")),
    (AnswerTooComplex, _invalid("invalid_value")),
    (EngineOverloaded, Problem(503, "server_error", "server_overloaded")),
    (EngineDraining, Problem(503, "server_error", "draining", headers={"Retry-After": str(DRAIN_RETRY_S)})),
    (UnknownEndpoint, _invalid("model_not_found", 404)),
    (UnknownAnswer, _invalid("not_found", 404)),
    (PlasticityUnavailable, _invalid("invalid_value")),
    (FlowStepsUnavailable, _invalid("unsupported_parameter")),
    (RoutedExpertsUnavailable, _invalid("unsupported_parameter")),
    (RoutedExpertsInvalid, _invalid("invalid_value")),
    (WithinRequestUnavailable, _invalid("invalid_value")),
    (ValueOffsetsUnavailable, _invalid("unsupported_parameter")),
    (ChatTemplateError, _invalid("invalid_value")),
    (InvalidConfig, _invalid("invalid_value")),
    (NonFiniteQueries, _invalid("invalid_value")),
    (KeyVersionUnavailable, Problem(409, "conflict_error", "key_version_unavailable", headers=NO_RETRY)),
    (InvalidSnapshot, _invalid("invalid_value")),
    (ModelMismatch, _invalid("invalid_value")),
    (CanaryFailed, Problem(409, "conflict_error", "canary_failed", headers=NO_RETRY)),
    (InvalidExpertFile, _invalid("invalid_value")),
    (InvalidExperts, _invalid("invalid_value")),
    (UnknownExpertGroup, _invalid("not_found", 404)),
    (ExpertGroupExists, Problem(409, "conflict_error", "conflict", headers=NO_RETRY)),
    (WrongGroupState, Problem(409, "conflict_error", "conflict", headers=NO_RETRY)),
    (SnapshotExists, Problem(409, "conflict_error", "conflict", headers=NO_RETRY)),
    (StoreUnavailable, Problem(503, "server_error", "store_unavailable", headers={"Retry-After": "5"})),
    (VersionConflict, Problem(409, "conflict_error", "conflict", headers=NO_RETRY)),
)  # fmt: skip
PARAMS: dict[type[Exception], str] = {
    AnswerTooComplex: "response_format",
    UnknownEndpoint: "model",
    UnknownAnswer: "id",
    PlasticityUnavailable: "plasticity",
    FlowStepsUnavailable: "flow_steps",
    RoutedExpertsUnavailable: "return_routed_experts",
    RoutedExpertsInvalid: "routed_experts",
    WithinRequestUnavailable: "within_request",
    ValueOffsetsUnavailable: "value_offsets",
    ChatTemplateError: "messages",
    InvalidConfig: "scope",
    KeyVersionUnavailable: "key_version",
    InvalidSnapshot: "name",
    ModelMismatch: "name",
    CanaryFailed: "name",
    InvalidExpertFile: "file",
    InvalidExperts: "name",
    UnknownExpertGroup: "name",
    ExpertGroupExists: "name",
    WrongGroupState: "name",
    SnapshotExists: "name",
    VersionConflict: "if_version",
}
BY_STATUS: dict[int, tuple[str, str]] = {  # what the router itself refuses
    404: ("not_found", "there is nothing at this path"),
    405: ("method_not_allowed", "this path does not answer to this method"),
}


def problem_of(error: Exception) -> Problem:
    """What the client is told of an error; anything unexpected is a 500 with a constant text."""
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors())
    if isinstance(error, HTTPException):
        return _of_router(error)
    for kind, problem in TABLE:
        if isinstance(error, kind):
            return _completed(error, replace(problem, message=str(error), param=_param_of(error)))
    return INTERNAL


def _completed(error: Exception, problem: Problem) -> Problem:
    """The parts of a problem that depend on more than the error's class."""
    if isinstance(error, EngineOverloaded | refusals.OverBudget):
        return replace(problem, headers={"Retry-After": str(error.retry_after_s)})
    if isinstance(error, refusals.NotServing) and error.draining:
        return replace(problem, code="draining", headers={"Retry-After": str(DRAIN_RETRY_S)})
    return problem


def _param_of(error: Exception) -> str | None:
    if isinstance(error, refusals.RequestError):
        return error.param
    return next((name for kind, name in PARAMS.items() if isinstance(error, kind)), None)


def _of_router(error: HTTPException) -> Problem:
    code, message = BY_STATUS.get(error.status_code, ("invalid_request", "the request cannot be answered"))
    return replace(_invalid(code, error.status_code, **(error.headers or {})), message=message)


def _of_validation(faults: Sequence[Any]) -> Problem:  # Any: pydantic's error dictionaries
    """The first fault of a body, a query or a path; FastAPI's 422 becomes a 400."""
    fault: dict[str, Any] = faults[0]
    kind: str = fault["type"]
    param = param_of_location(fault["loc"])
    if kind == "extra_forbidden":
        return replace(_invalid("unsupported_parameter"), message=f"unknown parameter {param!r}", param=param)
    if kind == "missing":
        return replace(
            _invalid("invalid_value"), message=f"{param or 'a JSON body'} is required", param=param
        )
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return replace(_invalid(code), message=f"{param or 'the body'}: {message}", param=param)


def param_of_location(location: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "role")` as `messages.0.role`; None for the body itself."""
    return ".".join(str(part) for part in location[1:])[:SHOWN_NAME_CHARS] or None
