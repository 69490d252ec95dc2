"""Why the engine does not take a request, or gives up on one.

EngineError
├── ContextLengthExceeded   prompt and max_tokens do not fit the model's context
├── EngineOverloaded        the queue is full; try again later
├── EngineDraining          the server is shutting down
├── AnswerTooComplex        to follow the response_format came to take too much
└── GenerationFailed        a step failed under this sequence
"""


class EngineError(Exception):
    """Root of the engine's errors."""


class ContextLengthExceeded(EngineError):
    """The prompt, or the prompt and what it asks for, is longer than the context."""

    def __init__(self, prompt_tokens: int, max_tokens: int, limit: int):
        super().__init__(
            f"this model's maximum context length is {limit} tokens; the prompt has {prompt_tokens} "
            f"and {max_tokens} are to be generated"
        )
        self.limit = limit


class EngineOverloaded(EngineError):
    """The waiting queue is full."""

    def __init__(self, waiting: int, retry_after_s: int):
        super().__init__(f"the server is overloaded: {waiting} requests are already waiting")
        self.retry_after_s = retry_after_s


class EngineDraining(EngineError):
    """The server is shutting down and takes no new requests."""


class AnswerTooComplex(EngineError):
    """The schema is such that following it through this answer takes more than is allowed."""


class GenerationFailed(EngineError):
    """A step failed under this sequence; the cause is in the log under the request's id."""
