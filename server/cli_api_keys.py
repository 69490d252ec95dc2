"""`libration keys api`: API keys made, listed and revoked. A running server takes every change with its next request."""

import json
import time
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from server.api_key_file import (
    FILE_NAME,
    ApiKeyFileError,
    StoredApiKey,
    create_api_key,
    read_api_keys,
    revoke_api_key,
)
from server.cli_tables import JSON_OPTION, print_done, print_table
from server.settings import ApiKeyLimits, Settings

COLUMNS = ("id", "name", "tenant", "level", "requests_per_minute", "learned_tokens_per_hour", "plasticity",
           "created_at", "expires_at")  # fmt: skip


@click.group()
def api() -> None:
    """Make, list and revoke API keys, also while a server runs.

    Once there is one, nobody gets in without. A running server takes every change with its next request.
    """


@api.command()
@click.argument("name")
@click.option("--tenant", default="default", show_default=True, help="Whose routing keys its requests teach.")
@click.option(
    "--level",
    type=click.Choice(["user", "admin"]),
    default="user",
    show_default=True,
    help="An admin may also use /admin.",
)
@click.option("--requests-per-minute", type=click.IntRange(min=1), help="Default: without limit.")
@click.option("--learned-tokens-per-hour", type=click.IntRange(min=1), help="Default: without limit.")
@click.option(
    "--plasticity",
    type=click.Choice(["off", "read", "learn"]),
    help="Of requests that do not say (default: the endpoint's).",
)
@click.option(
    "--days", type=click.FloatRange(min=0, min_open=True), help="Expires after so many (default: never)."
)
@JSON_OPTION
@click.pass_obj
def create(settings: Settings, name: str, days: float | None, *, as_json: bool, **limits: Any) -> None:
    """Make the API key NAME and print it.

    It is printed this once: only its digest is kept.
    """
    try:
        made, secret = create_api_key(_file(settings), name, ApiKeyLimits(**limits), days, time.time())
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise click.ClickException(faults) from error
    except (ApiKeyFileError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(_row(made) | {"api_key": secret}))
        return
    click.echo(secret)
    click.echo(
        f"API key {made.name!r} ({made.id}), level {made.level}, tenant {made.tenant}. It is shown this once; "
        "send it as 'Authorization: Bearer KEY'.",
        err=True,
    )


@api.command("list")
@JSON_OPTION
@click.pass_obj
def list_(settings: Settings, *, as_json: bool) -> None:
    """Every API key that was made here. Those of the configuration are in `libration config show`."""
    try:
        rows = [_row(each) for each in read_api_keys(_file(settings))]
    except (ApiKeyFileError, OSError) as error:
        raise click.ClickException(str(error)) from error
    print_table(rows, COLUMNS, as_json=as_json)


@api.command()
@click.argument("name")
@JSON_OPTION
@click.pass_obj
def revoke(settings: Settings, name: str, *, as_json: bool) -> None:
    """Take away the API key NAME, or the one with that id, for ever."""
    try:
        revoked = revoke_api_key(_file(settings), name)
    except (ApiKeyFileError, OSError) as error:
        raise click.ClickException(str(error)) from error
    print_done(_row(revoked), f"API key {revoked.name!r} ({revoked.id}) is revoked", as_json)


def _file(settings: Settings) -> Path:
    return settings.data_dir / FILE_NAME


def _row(kept: StoredApiKey) -> dict[str, object]:
    return {"id": kept.id, **kept.model_dump(exclude={"digest"})}
