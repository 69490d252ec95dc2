"""POST /v1/feedback."""

from typing import Annotated

from pydantic import Field

from server.schemas.base import Body


class FeedbackBody(Body):
    """How good a past answer was, all its choices together."""

    id: Annotated[str, Field(min_length=1, max_length=128)]  # of the answer
    reward: Annotated[float, Field(ge=-1, le=1)]  # what the credit of its tokens is multiplied by
