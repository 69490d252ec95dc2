"""Why a request is refused before any engine sees it. What HTTP makes of each is in `server.errors`.

RequestError
├── InvalidRequest        a field of the body, the query or the path is not what it must be
│   └── InvalidType       it is not even of the right type
├── UnsupportedParameter  a field that is unknown, or known and not offered
├── MalformedBody         the body is no JSON, or JSON of an absurd shape
├── Unauthenticated       no API key, or an unknown one
├── Forbidden             the API key does not allow this
├── NotFound              nothing of that name is here
├── BodyTooLarge          more bytes than a body may have
├── BodyTooSlow           the body did not arrive in time
├── UnsupportedMediaType  the body is not declared as JSON
├── Conflict              the request contradicts what is already so
├── OverBudget            the API key has used up what it may ask, or teach, for now
├── TooManyListeners      the event streams that the server bears are taken
├── TooManyCompilations   schemas of other requests are waiting to be compiled
└── NotServing            the server cannot answer now; the message says why
"""


class RequestError(Exception):
    """Root of these errors. `param` names the field at fault, as a path from the body's root."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A value outside what is allowed."""


class InvalidType(InvalidRequest):
    """A value of another type than the field's."""


class UnsupportedParameter(RequestError):
    """A field that has no meaning here, which is never ignored."""


class MalformedBody(RequestError):
    """The body cannot be read as JSON."""


class Unauthenticated(RequestError):
    """The request does not say who it is from, or says it wrongly."""


class Forbidden(RequestError):
    """Known, but not allowed."""


class NotFound(RequestError):
    """No such thing."""


class BodyTooLarge(RequestError):
    """The limit is in the message."""


class BodyTooSlow(RequestError):
    """The deadline is in the message."""


class UnsupportedMediaType(RequestError):
    """Only application/json is read."""


class Conflict(RequestError):
    """It would not help to ask again."""


class OverBudget(RequestError):
    """Come back when the budget has filled up."""

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyListeners(RequestError):
    """Come back when one has left."""


class TooManyCompilations(RequestError):
    """Come back in a moment."""


class NotServing(RequestError):
    """Hung, draining or not started."""

    def __init__(self, message: str, *, draining: bool = False):
        super().__init__(message)
        self.draining = draining
