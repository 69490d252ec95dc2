"""`libration keys experts`: experts added to an endpoint, while no server runs. The next start serves them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keystore.records import ScopeId
from server.cli_keys import ENDPOINT_ARGUMENT, SCOPE_OPTION
from server.cli_tables import JSON_OPTION, print_done, print_table
from server.offline_keys import key_store
from server.settings import Settings

if TYPE_CHECKING:
    from keystore.pool import ExpertGroup

Command = Callable[..., Any]  # Any: click's commands take what their options say


@click.group()
def experts() -> None:
    """Add experts while no server runs.

    /admin/experts of a running one does the same.
    """


def _command(command: Command) -> Command:
    return experts.command(command.__name__.removesuffix("_"))(JSON_OPTION(click.pass_obj(command)))


@_command
@ENDPOINT_ARGUMENT
def list_(settings: Settings, endpoint: str, *, as_json: bool) -> None:
    """Every group of experts that was ever added.

    With how far the addresses of those that settle have come.
    """
    with key_store(settings, endpoint) as store:
        rows: list[dict[str, object]] = []
        for group in store.experts.all():
            settling = store.experts.settling(group.name) if group.state == "settling" else {}
            drift = {str(layer): each.drift.tolist() for layer, each in settling.items()}
            rows.append(_row(group) | {"drift": drift})
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        row["experts"] = _told(row["expert_ids"])
        row["drift"] = _told(row["drift"])
    columns = ("name", "scope", "state", "created_at", "experts", "drift")
    print_table(rows, columns, as_json=False)


@_command
@ENDPOINT_ARGUMENT
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("name")
@SCOPE_OPTION
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of random addresses.")
def add(
    settings: Settings, endpoint: str, file: Path, name: str, scope: ScopeId, seed: int, *, as_json: bool
) -> None:
    """Add the experts in FILE as the group NAME, for --scope to settle."""
    with key_store(settings, endpoint, may_create=True) as store:
        from model.checkpoints.experts import read_experts  # torch takes seconds to import
        from server.build import plastic_layers_of, read_variant
        from server.expert_files import addresses, keep, kept_folder, plastic_blocks

        configured = settings.endpoints[endpoint]
        variant = read_variant(configured)
        blocks = plastic_blocks(variant.blocks, plastic_layers_of(configured, variant.config))
        read = read_experts(file, blocks)
        keep(read, kept_folder(settings, endpoint))
        group = store.experts.add(name, scope, addresses(read, blocks, seed), read.digest)
    _print_group(endpoint, group, f"{name} settles in {scope} from the next start on", as_json)


@_command
@ENDPOINT_ARGUMENT
@click.argument("name")
def promote(settings: Settings, endpoint: str, name: str, *, as_json: bool) -> None:
    """Show the group NAME to everybody, where it has settled.

    Where it is now becomes its anchors.
    """
    with key_store(settings, endpoint) as store:
        group = store.experts.promote(name)
    _print_group(endpoint, group, f"{name} is promoted: every scope sees it", as_json)


@_command
@ENDPOINT_ARGUMENT
@click.argument("name")
def retire(settings: Settings, endpoint: str, name: str, *, as_json: bool) -> None:
    """Hide the group NAME from everybody, for ever."""
    with key_store(settings, endpoint) as store:
        group = store.experts.retire(name)
    _print_group(endpoint, group, f"{name} is retired: nobody sees it", as_json)


def _print_group(endpoint: str, group: "ExpertGroup", text: str, as_json: bool) -> None:
    print_done({"endpoint": endpoint} | _row(group), text, as_json)


def _row(group: "ExpertGroup") -> dict[str, object]:
    ids = {str(layer): each.tolist() for layer, each in group.expert_ids.items()}
    return {"name": group.name, "scope": str(group.scope), "state": group.state, "created_at": group.added_at,
            "digest": group.digest, "expert_ids": ids}  # fmt: skip


def _told(by_layer: Any) -> str:  # Any: numbers by layer, of either table column
    return "; ".join(
        f"layer {layer}: {', '.join(f'{each:.3g}' for each in values)}" for layer, values in by_layer.items()
    )
