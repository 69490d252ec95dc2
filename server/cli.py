"""The command line: reads arguments, calls the part that does the work, prints what a person wants to know."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from server.settings import Settings, load_settings

CONFIG_OPTION = click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="TOML configuration file."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="libration")
def main() -> None:
    """Libration serves mixture-of-experts language models whose routing keeps learning."""


@main.command()
@CONFIG_OPTION
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on (default 8000).")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where everything the server writes goes.")
@click.option("--insecure", is_flag=True, default=None, help="Listen off loopback without API keys.")
def serve(config_file: Path | None, data_dir: Path | None, **listen: Any) -> None:
    """Serve the configured endpoints over HTTP."""
    started = time.monotonic()
    settings = _settings(config_file, data_dir=data_dir, server=listen)
    if not settings.server.on_loopback and not settings.server.api_keys and not settings.server.insecure:
        raise click.ClickException(
            f"refusing to listen on {settings.server.host} without API keys: configure server.api_keys, "
            "listen on 127.0.0.1, or pass --insecure"
        )
    processors = os.sched_getaffinity(0)
    if settings.engine.threads != 1:
        # The engine's compute threads wait for each other at every product. Left to itself the kernel often wakes
        # one on the other's processor, which costs a third of the throughput (docs/performance.md).
        os.environ.setdefault("OMP_PROC_BIND", "true")
    # Torch and FAISS take a second to import: only the command that needs them pays for it.
    from server.start import serve_until_signal

    serve_until_signal(settings, started, processors)


@main.group()
def config() -> None:
    """Check or show the configuration."""


@config.command("check")
@CONFIG_OPTION
def config_check(config_file: Path | None) -> None:
    """Say whether the configuration is valid; exit with 1 and every fault if it is not."""
    _settings(config_file)
    click.echo("the configuration is valid")


@config.command("show")
@CONFIG_OPTION
def config_show(config_file: Path | None) -> None:
    """Print the effective configuration as JSON, secrets redacted."""
    click.echo(json.dumps(_settings(config_file).model_dump(mode="json"), indent=2))


@main.command()
@click.argument("variant", type=click.Choice(["some"]))
@click.option(
    "--run",
    "run_dir",
    type=click.Path(path_type=Path),
    required=True,
    help="Run folder; resumed if it exists.",
)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Data folder; built if empty.")
@click.option("--tokens-per-domain", default=118_000, show_default=True, type=click.IntRange(min=4096))
@click.option(
    "--chat-tokens",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Tokens of conversations that the base writes first; keeps its manners.",
)
@click.option(
    "--init", "initial", type=click.Path(path_type=Path), help="Blocks to start from (default: fresh ones)."
)
@click.option("--epochs", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--learning-rate", default=2e-3, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--threads", default=0, type=click.IntRange(min=0), help="0: every processor.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where converted base weights are kept.")
def train(variant: str, run_dir: Path, data: Path, data_dir: Path | None, **options: Any) -> None:
    """Train the expert blocks of VARIANT on the frozen base, from text installed on this machine."""
    from server.offline import train_variant

    train_variant(variant, run_dir, data, _settings(None, data_dir=data_dir).data_dir, **options)


@main.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Data folder; built if empty.")
@click.option(
    "--blocks", type=click.Path(path_type=Path), help="Blocks to measure (default: the shipped ones)."
)
@click.option("--split", type=click.Choice(["validation", "heldout"]), default="heldout", show_default=True)
@click.option("--threads", default=0, type=click.IntRange(min=0), help="0: every processor.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where converted base weights are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def evaluate(data: Path, blocks: Path | None, data_dir: Path | None, **options: Any) -> None:
    """Held-out loss per domain of `some` beside `dense`, the untouched base."""
    from server.offline import evaluate_some

    evaluate_some(data, blocks, _settings(None, data_dir=data_dir).data_dir, **options)


def _settings(config_file: Path | None, **flags: Any) -> Settings:
    """Settings, or a message that names every fault and an exit status of 1."""
    try:
        return load_settings(config_file, **_without_none(flags))
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg']}" for e in error.errors()]
        raise click.ClickException("the configuration is not valid:\n" + "\n".join(faults)) from error
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    """Flags that were not given must not hide what the environment or the file says."""
    kept = {key: _without_none(value) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}


if __name__ == "__main__":
    sys.exit(main())
