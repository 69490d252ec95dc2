"""What every table of the configuration is made of."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    """A table of the configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_secret(path: Path) -> str:
    """The one line of a secret's file. Raises OSError when it cannot be read."""
    return path.read_text().strip()
