"""`libration adapt`: blocks of `some` for a dense checkpoint, trained on a folder of text."""

from pathlib import Path
from typing import Any

import click

from server.cli_settings import checked_settings, errors_shown
from server.cli_train import (
    DATA_DIR_OPTION,
    DEVICE_OPTION,
    RUN_OPTION,
    SEED_OPTION,
    STEPS_OPTION,
    THREADS_OPTION,
)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of UTF-8 text; a tenth is held out.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of blocks to write.")
@click.option(
    "--layer",
    "layers",
    multiple=True,
    type=click.IntRange(min=0),
    help="May be given several times (default: up to four of the upper half).",
)
@click.option("--experts", default=64, show_default=True, type=click.IntRange(1, 65_536), help="A layer.")
@click.option(
    "--experts-per-token",
    "per_token",
    default=4,
    show_default=True,
    type=click.IntRange(1, 256),
    help="Found for each token.",
)
@click.option(
    "--expert-size", default=24, show_default=True, type=click.IntRange(8, 65_536), help="Its width."
)
@click.option(
    "--key-size", default=96, show_default=True, type=click.IntRange(8, 65_536), help="Numbers in a key."
)
@STEPS_OPTION
@click.option(
    "--learning-rate",
    default=4e-3,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Of AdamW.",
)
@RUN_OPTION
@SEED_OPTION
@DEVICE_OPTION
@THREADS_OPTION
@DATA_DIR_OPTION
def adapt(data_dir: Path | None, device: str, threads: int, **job: Any) -> None:
    """Give a dense checkpoint experts of its own.

    They stand behind some layers of MODEL, which itself stays as it is. Serve the result with `model = "MODEL"`, `variant = "some"` and `weights = "OUT"`.
    """
    from server.offline_adapt import AdaptJob
    from server.offline_adapt import adapt as run_adapt

    with errors_shown():
        directory = checked_settings(None, data_dir=data_dir).data_dir
        run_adapt(AdaptJob(**job), directory, device, threads)
