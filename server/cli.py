"""The command line: reads arguments, calls the part that does the work, prints what a person wants to know."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from server.api_key_file import FILE_NAME
from server.cli_adapt import adapt
from server.cli_bench import bench
from server.cli_chat import chat
from server.cli_completion import completion, plastic_names
from server.cli_convert import convert
from server.cli_experts import experts
from server.cli_keys import keys
from server.cli_settings import CONFIG_OPTION, checked_settings, errors_shown, faults_of, own_endpoint, told
from server.cli_tables import JSON_OPTION
from server.cli_train import train
from server.cli_worker import worker
from server.memory import share_one_heap


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
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Serve a model of your own: a Hugging Face folder or a GGUF file, under the name of its folder.",
)
@click.option("--plastic", is_flag=True, help="With --model: the routing of its experts keeps learning.")
def serve(
    config_file: Path | None, data_dir: Path | None, model: Path | None, *, plastic: bool, **listen: Any
) -> None:
    """Serve the configured endpoints over HTTP.

    With --model that model, in place of the default ones.
    """
    started = time.monotonic()
    settings = checked_settings(
        config_file, data_dir=data_dir, server=listen, endpoints=own_endpoint(model, plastic=plastic)
    )
    has_api_keys = settings.server.api_keys or (settings.data_dir / FILE_NAME).exists()
    if not settings.server.on_loopback and not has_api_keys and not settings.server.insecure:
        raise click.ClickException(
            f"refusing to listen on {settings.server.host} without API keys: make one with "
            "`libration keys api create NAME`, listen on 127.0.0.1, or pass --insecure"
        )
    processors = os.sched_getaffinity(0)
    if settings.engine.threads != 1:
        # The engine's compute threads wait for each other at every product. Left to itself the kernel often wakes
        # one on the other's processor, which costs a third of the throughput (docs/performance.md).
        os.environ.setdefault("OMP_PROC_BIND", "true")
    share_one_heap()
    # Torch and FAISS take a second to import: only the command that needs them pays for it.
    from server.start import serve_until_signal

    serve_until_signal(settings, started, processors)


keys.add_command(experts)
main.add_command(keys)
main.add_command(chat)
main.add_command(train)
main.add_command(adapt)
main.add_command(convert)
main.add_command(bench)
main.add_command(worker)
main.add_command(completion)


@main.group()
def config() -> None:
    """Check or show the configuration."""


@config.command("check")
@CONFIG_OPTION
@JSON_OPTION
def config_check(config_file: Path | None, *, as_json: bool) -> None:
    """Say whether the configuration is valid.

    If it is not, name every fault and exit with 1.
    """
    faults = faults_of(config_file)
    if as_json:
        click.echo(json.dumps({"valid": not faults, "faults": faults}))
        sys.exit(1 if faults else 0)
    if faults:
        raise click.ClickException(told(faults))
    click.echo("the configuration is valid")


@config.command("show")
@CONFIG_OPTION
def config_show(config_file: Path | None) -> None:
    """Print the effective configuration as JSON, secrets redacted."""
    click.echo(json.dumps(checked_settings(config_file).model_dump(mode="json"), indent=2))


@main.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Data folder; built if empty.")
@click.option("--all", "every_variant", is_flag=True, help="Measure everything that comes with Libration.")
@click.option(
    "--blocks",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A folder of blocks to measure; may be given several times.",
)
@click.option(
    "--split",
    type=click.Choice(["validation", "heldout"]),
    default="heldout",
    show_default=True,
    help="Which part of the data.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Also write evaluation.json and evaluation.png here."
)
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda.")
@click.option("--threads", default=0, type=click.IntRange(min=0), help="0: every processor.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where converted base weights are kept.")
@JSON_OPTION
def evaluate(
    data: Path, folders: tuple[Path, ...], every_variant: bool, data_dir: Path | None, **options: Any
) -> None:
    """Measure the loss of expert blocks on held-out text.

    Domain by domain, beside `dense`, the untouched base.
    """
    if not folders and not every_variant:
        raise click.UsageError("say what to measure: --all, or --blocks FOLDER")
    from server.offline import evaluate_blocks

    with errors_shown():
        directory = checked_settings(None, data_dir=data_dir).data_dir
        evaluate_blocks(data, folders, directory, every_variant=every_variant, **options)


@main.command()
@click.argument("text", type=click.Path(path_type=Path))
@CONFIG_OPTION
@click.option(
    "--endpoint",
    default="some",
    show_default=True,
    shell_complete=plastic_names,
    help="Whose blocks and law to use.",
)
@click.option(
    "--rule", type=click.Choice(["literal", "direct", "gradient"]), help="In place of the endpoint's own."
)
@click.option(
    "--value-rate",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0, max=1),
    help="Also try value offsets at this rate; 0.04 is a good one.",
)
@click.option(
    "--window", type=click.IntRange(min=2, max=8192), help="Tokens of a window (default: the endpoint's)."
)
@click.option("--max-tokens", type=click.IntRange(min=2), help="Stop after this many.")
@click.option(
    "--held-out",
    type=click.Path(path_type=Path),
    help="Text that must not be forgotten (default: the guard's).",
)
@click.option("--out", type=click.Path(path_type=Path), help="Also write stream.json and stream.png here.")
@click.option("--threads", default=0, type=click.IntRange(min=0), help="0: every processor.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where converted base weights are kept.")
@JSON_OPTION
def stream(config_file: Path | None, data_dir: Path | None, threads: int, as_json: bool, **job: Any) -> None:
    """Predict a text window by window, and learn from it.

    TEXT is a file or a folder; each window teaches after it was predicted. Shows what a rule saves against frozen routing on the same windows, beside an output bias that learns the same
    way, and what it costs on other text. Nothing that a server keeps is read or written.
    """
    from server.stream.command import StreamJob
    from server.stream.command import stream as run_stream

    with errors_shown():
        run_stream(
            checked_settings(config_file, data_dir=data_dir), StreamJob(**job), threads, as_json=as_json
        )


if __name__ == "__main__":
    sys.exit(main())
