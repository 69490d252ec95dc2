"""The configuration as every command reads it: faults become a message and an exit status."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from server.settings import Settings, load_settings

CONFIG_OPTION = click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="TOML configuration file."
)


def checked_settings(config_file: Path | None, **flags: Any) -> Settings:
    """Settings, or a message that names every fault and an exit status of 1."""
    try:
        return load_settings(config_file, **_without_none(flags))
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg']}" for e in error.errors()]
        raise click.ClickException("the configuration is not valid:\n" + "\n".join(faults)) from error
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


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
