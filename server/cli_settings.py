"""The configuration as every command reads it: faults become a message and an exit status."""

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ValidationError

from server.settings import Settings, load_settings

WRITTEN = {("data_dir",), ("experts_dir",)}  # folders that a server makes
MAX_NAME = 64  # characters of an endpoint's name
CONFIG_OPTION = click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="TOML configuration file."
)


def checked_settings(config_file: Path | None, **flags: Any) -> Settings:
    """Settings, or a message that names every fault and an exit status of 1."""
    try:
        return load_settings(config_file, **_without_none(flags))
    except ValidationError as error:
        raise click.ClickException(told(_faults(error))) from error
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def told(faults: list[dict[str, str]]) -> str:
    lines = [f"  {fault['where']}: {fault['message']}" for fault in faults]
    return "\n".join(["the configuration is not valid:", *lines])


def faults_of(config_file: Path | None) -> list[dict[str, str]]:
    """What is wrong with the configuration, each with where; empty when it is valid.

    Also files and folders that it names and that are not there.
    """
    try:
        return list(_missing(load_settings(config_file), ()))
    except ValidationError as error:
        return _faults(error)
    except (OSError, ValueError) as error:
        return [{"where": "file", "message": str(error)}]


def _missing(value: Any, where: tuple[str, ...]) -> Iterator[dict[str, str]]:  # Any: of a configuration
    if isinstance(value, Path):
        if where not in WRITTEN and not value.exists():
            yield {"where": ".".join(where), "message": f"there is no {value}"}
    elif isinstance(value, BaseModel | dict):
        for name, inner in dict[str, Any](value).items():
            yield from _missing(inner, (*where, name))
    elif isinstance(value, tuple):
        for i, inner in enumerate(tuple[Any, ...](value)):
            yield from _missing(inner, (*where, str(i)))


def _faults(error: ValidationError) -> list[dict[str, str]]:
    return [
        {"where": ".".join(map(str, each["loc"])) or "configuration", "message": each["msg"]}
        for each in error.errors()
    ]


def own_endpoint(model: Path | None, *, plastic: bool) -> dict[str, Any]:
    """What `--model` adds to the configuration: an endpoint with the name of the folder or file."""
    if model is None:
        if plastic:
            raise click.UsageError("--plastic says how to serve a model of your own: give --model too")
        return {}
    path = model.expanduser().absolute()
    plain = re.sub(r"[^a-z0-9._-]+", "-", (path.stem if path.suffix == ".gguf" else path.name).lower())
    name = plain.lstrip("._-")[:MAX_NAME] or "model"
    return {name: {"model": path} | ({"plastic": True} if plastic else {})}


@contextmanager
def errors_shown() -> Generator[None, None, None]:
    """What went wrong with a model, its files or its training text, as a message and an exit status of 1."""
    from model.errors import ModelError

    try:
        yield
    except (ModelError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    """Flags that were not given must not hide what the environment or the file says."""
    kept = {key: _without_none(value) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}
