"""What commands print: a table or a sentence for a person, JSON for a machine."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import click

TIMES = frozenset({"created_at", "expires_at", "at"})
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def print_done(done: Mapping[str, object], text: str, as_json: bool) -> None:
    click.echo(json.dumps(done) if as_json else text)


def print_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows))
        return
    cells = [[*columns], *([shown_cell(name, row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        click.echo("  ".join(map(str.ljust, line, widths)).rstrip())


def shown_cell(name: str, value: object) -> str:
    if value is None:
        return "-"
    if name in TIMES:
        return datetime.fromtimestamp(float(str(value)), UTC).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
