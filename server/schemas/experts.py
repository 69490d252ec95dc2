"""Bodies of the routes for experts that are added."""

from typing import Annotated

from pydantic import Field

from server.schemas.base import Body, ScopeName

FileName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.safetensors$")
]  # no slash: no path
GroupName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class AddExpertsBody(Body):
    file: FileName
    name: GroupName
    scope: ScopeName | None = None  # None: the caller's tenant, or global where everybody teaches one scope
    seed: Annotated[int, Field(ge=0, le=2**53)] = 0  # of the addresses, where the file has none
