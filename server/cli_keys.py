"""`libration keys`: a key store looked at and changed by hand while no server runs.

The file has one writer. While a server has it, its routes under /v1/keys and /admin/keys do the same.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from keystore.backends.base import EVERY_SCOPE, VersionRow
from keystore.errors import InvalidConfig
from keystore.records import ScopeId
from server.cli_api_keys import api
from server.cli_completion import plastic_names
from server.cli_settings import CONFIG_OPTION, checked_settings
from server.cli_tables import JSON_OPTION, print_done, print_table, shown_cell
from server.offline_keys import file_of, key_store, plastic_endpoints, stored_keys
from server.settings import Settings

Command = Callable[..., Any]  # Any: click's commands take what their options say


class ScopeType(click.ParamType[ScopeId]):
    name = "scope"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ScopeId:
        try:
            scope = value if isinstance(value, ScopeId) else ScopeId.parse(value)
        except InvalidConfig as error:
            self.fail(str(error), param, ctx)
        if scope.kind == "anchor":
            self.fail(
                "the anchors never change; allowed: global, tenant:NAME or session:TENANT/NAME", param, ctx
            )
        return scope


ENDPOINT_ARGUMENT = click.argument("endpoint", shell_complete=plastic_names)
SCOPE_OPTION = click.option(
    "--scope", type=ScopeType(), default="tenant:default", show_default=True, help="Whose keys."
)
IF_VERSION_OPTION = click.option(
    "--if-version", type=click.IntRange(min=0), help="Change nothing unless the scope is at this version."
)


@click.group()
@CONFIG_OPTION
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the server writes.")
@click.pass_context
def keys(context: click.Context, config_file: Path | None, data_dir: Path | None) -> None:
    """Look at and change routing keys; make API keys.

    Routing keys only while no server runs, API keys (`api`) at any time.
    """
    context.obj = checked_settings(config_file, data_dir=data_dir)


keys.add_command(api)


def _command(command: Command) -> Command:
    """A subcommand of `keys` that gets the settings first and can print JSON."""
    return keys.command(command.__name__.removesuffix("_"))(JSON_OPTION(click.pass_obj(command)))


@_command
def list_(settings: Settings, *, as_json: bool) -> None:
    """Every scope that has learned, and where it stands."""
    found: list[dict[str, object]] = []
    for name in plastic_endpoints(settings):
        if not file_of(settings, name).exists():
            continue
        with stored_keys(settings, name) as backend:
            frozen = backend.frozen()
            for head in sorted(backend.heads(), key=lambda each: str(each.scope)):
                names = {EVERY_SCOPE, str(head.scope), str(head.scope.parent)}
                found.append({"endpoint": name, "scope": str(head.scope), "version": head.version,
                              "created_at": head.created_at, "frozen": bool(names & frozen)})  # fmt: skip
    print_table(found, ("endpoint", "scope", "version", "created_at", "frozen"), as_json=as_json)


@_command
@ENDPOINT_ARGUMENT
@SCOPE_OPTION
@click.option("--version", type=click.IntRange(min=0), help="Default: the newest; 0 is the anchors.")
def show(settings: Settings, endpoint: str, scope: ScopeId, version: int | None, *, as_json: bool) -> None:
    """One version, layer by layer.

    How many keys there are, and how far they are from home.
    """
    from server.keyspace import read_layers

    with key_store(settings, endpoint) as store:
        view = store.view(scope, version)
        layers: list[dict[str, object]] = [
            {"layer": layer, "keys": len(view.keys_of(layer)), "plastic": layer in view.usage,
             "moved": read.moved, "drift_max": read.drift_max, "drift_mean": read.drift_mean}
            for layer, read in read_layers(store, view).items()
        ]  # fmt: skip
        about = {"endpoint": endpoint, "scope": str(scope), "version": view.version, "tokens": view.tokens,
                 "checksum": view.checksum, "reason": view.reason, "frozen": store.is_frozen(scope)}  # fmt: skip
    if as_json:
        click.echo(json.dumps(about | {"layers": layers}))
        return
    for name, value in about.items():
        click.echo(f"{name:<10}{shown_cell(name, value)}")
    print_table(layers, tuple(layers[0]), as_json=False)


@_command
@ENDPOINT_ARGUMENT
@SCOPE_OPTION
def versions(settings: Settings, endpoint: str, scope: ScopeId, *, as_json: bool) -> None:
    """The versions that are kept, newest first. Version 0, the anchors, is always there."""
    with stored_keys(settings, endpoint) as backend:
        rows = [_row(each) for each in backend.versions(scope)]
    print_table(rows, ("version", "parent", "created_at", "tokens", "drift_max", "reason"), as_json=as_json)


@_command
@ENDPOINT_ARGUMENT
@click.option("--scope", type=ScopeType(), help="Whose keys; a tenant's sessions included. Default: all.")
def freeze(settings: Settings, endpoint: str, scope: ScopeId | None, *, as_json: bool) -> None:
    """Stop learning of one scope, or of all without --scope."""
    _set_frozen(settings, endpoint, scope, frozen=True, as_json=as_json)


@_command
@ENDPOINT_ARGUMENT
@click.option("--scope", type=ScopeType(), help="The scope that was frozen. Default: all.")
def unfreeze(settings: Settings, endpoint: str, scope: ScopeId | None, *, as_json: bool) -> None:
    """Undo a freeze of the same scope."""
    _set_frozen(settings, endpoint, scope, frozen=False, as_json=as_json)


@_command
@ENDPOINT_ARGUMENT
@click.argument("to_version", type=click.IntRange(min=0))
@SCOPE_OPTION
@IF_VERSION_OPTION
def rollback(
    settings: Settings,
    endpoint: str,
    to_version: int,
    scope: ScopeId,
    if_version: int | None,
    *,
    as_json: bool,
) -> None:
    """Publish the keys of TO_VERSION as a new version.

    0 goes back to the anchors.
    """
    with key_store(settings, endpoint) as store:
        version = store.rollback(scope, to_version, if_version=if_version)
    done = {"endpoint": endpoint, "scope": str(scope), "version": version}
    print_done(done, f"{scope} is at version {version}, which is version {to_version} again", as_json)


@_command
@ENDPOINT_ARGUMENT
@click.argument("file", type=click.Path(path_type=Path))
@SCOPE_OPTION
@click.option("--version", type=click.IntRange(min=0), help="Default: the newest; 0 is the anchors.")
def export(
    settings: Settings, endpoint: str, file: Path, scope: ScopeId, version: int | None, *, as_json: bool
) -> None:
    """Write one version to FILE, a new safetensors file."""
    with key_store(settings, endpoint) as store:
        view = store.snapshot(scope, version, file)
    done = {"endpoint": endpoint, "scope": str(scope), "version": view.version, "file": str(file),
            "checksum": view.checksum}  # fmt: skip
    print_done(done, f"version {view.version} of {scope} is in {file}", as_json)


@_command
@ENDPOINT_ARGUMENT
@click.argument("file", type=click.Path(path_type=Path))
@SCOPE_OPTION
@IF_VERSION_OPTION
def import_(
    settings: Settings, endpoint: str, file: Path, scope: ScopeId, if_version: int | None, *, as_json: bool
) -> None:
    """Publish the keys in FILE as a new version. Keys of other weights are refused."""
    with key_store(settings, endpoint, may_create=True) as store:
        version = store.restore(scope, file, if_version=if_version)
    done = {"endpoint": endpoint, "scope": str(scope), "version": version, "file": str(file)}
    print_done(done, f"{scope} is at version {version}, the keys in {file}", as_json)


@_command
@ENDPOINT_ARGUMENT
@click.option("--scope", type=ScopeType(), help="What happened to these keys. Default: to any.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Newest events.")
def audit(settings: Settings, endpoint: str, scope: ScopeId | None, limit: int, *, as_json: bool) -> None:
    """Verify the audit trail's hash chain and print its newest events."""
    with stored_keys(settings, endpoint) as backend:
        verified = backend.verify_audit()
        events = backend.audit_trail(scope, limit)
    if as_json:
        click.echo(json.dumps({"endpoint": endpoint, "verified": verified, "events": events}))
        return
    click.echo(f"{verified} events, the hash chain is whole")
    columns = ("id", "at", "event", "scope", "version", "reason")
    rows = [{name: event.get(name, "") for name in columns} for event in events]
    print_table(rows, columns, as_json=False)


def _set_frozen(
    settings: Settings, endpoint: str, scope: ScopeId | None, *, frozen: bool, as_json: bool
) -> None:
    name = EVERY_SCOPE if scope is None else str(scope)
    with stored_keys(settings, endpoint) as backend:
        backend.set_frozen(name, frozen, datetime.now(UTC).timestamp())
    shown = None if scope is None else str(scope)
    text = f"{shown or 'every scope'} of {endpoint} is {'frozen' if frozen else 'no longer frozen by name'}"
    print_done({"endpoint": endpoint, "scope": shown, "frozen": frozen}, text, as_json)


def _row(row: VersionRow) -> dict[str, object]:
    return {"version": row.version, "parent": row.parent, "created_at": row.created_at,
            "tokens": row.tokens, "drift_max": row.drift_max, "drift_mean": row.drift_mean,
            "checksum": row.checksum, "reason": row.reason}  # fmt: skip
