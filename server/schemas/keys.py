"""Bodies of the key space's and the administration's routes."""

from typing import Annotated

from pydantic import Field, model_validator

from server.refusals import InvalidRequest
from server.schemas.base import Body, KeyVersion, ScopeName

Coordinate = Annotated[float, Field(ge=-1e30, le=1e30)]  # within float32
SnapshotName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]  # no dot, no slash: no path


class SearchBody(Body):
    """Which experts are closest: to each token of a text, or to a point of the key space."""

    text: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None
    vector: Annotated[list[Coordinate], Field(min_length=1, max_length=65_536, fail_fast=True)] | None = None
    k: Annotated[int, Field(ge=1, le=1024)] = 8

    @model_validator(mode="after")
    def _one_of_two(self) -> "SearchBody":
        if (self.text is None) == (self.vector is None):
            raise InvalidRequest("give either 'text' or 'vector'", "text")
        return self


class FreezeBody(Body):
    scope: ScopeName | None = None  # None: every scope


class ResetBody(Body):
    scope: ScopeName | None = None  # None: the caller's tenant
    if_version: KeyVersion | None = None


class RollbackBody(ResetBody):
    to_version: KeyVersion


class SnapshotBody(Body):
    scope: ScopeName | None = None  # None: the caller's tenant
    version: KeyVersion | None = None  # None: the newest
    name: SnapshotName


class RestoreBody(ResetBody):
    name: SnapshotName


class ConsolidateBody(Body):
    """Nothing to choose."""
