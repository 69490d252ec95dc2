"""`libration train`: the blocks of a variant, or a few new experts beside trained ones."""

from pathlib import Path
from typing import Any

import click

from server.cli_settings import checked_settings, errors_shown

VARIANTS = ("some", "moe", "mom", "fm-moe", "ffn-active", "ffn-total")
DEVICE_OPTION = click.option("--device", default="cpu", show_default=True, help="Where to train: cpu, cuda.")
THREADS_OPTION = click.option("--threads", default=0, type=click.IntRange(min=0), help="0: every processor.")
DATA_DIR_OPTION = click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Where converted base weights are kept."
)
SEED_OPTION = click.option(
    "--seed", default=2026, show_default=True, type=click.IntRange(min=0), help="Of all that is random."
)
# Of what is trained on a person's own text.
STEPS_OPTION = click.option(
    "--steps", type=click.IntRange(min=1), help="Default: until the text was seen three times."
)
RUN_OPTION = click.option(
    "--run",
    type=click.Path(path_type=Path),
    help="Folder to go on from when interrupted (default: beside --out).",
)


@click.group()
def train() -> None:
    """Train expert blocks on the frozen base.

    Those of a whole variant, or a few new experts beside trained ones.
    """


def _variant(name: str) -> click.Command:
    """`libration train NAME`."""
    note = "A control that the routed variants have to beat. " if name.startswith("ffn-") else ""

    @train.command(
        name,
        help=f"Train the blocks of {name}.\n\n{note}The text is what is installed on this machine.",
    )
    @click.option(
        "--run",
        type=click.Path(path_type=Path),
        required=True,
        help="Run folder; resumed if it exists.",
    )
    @click.option(
        "--data", type=click.Path(path_type=Path), required=True, help="Data folder; built if empty."
    )
    @click.option(
        "--tokens-per-domain",
        default=118_000,
        show_default=True,
        type=click.IntRange(min=4096),
        help="How much text of each domain.",
    )
    @click.option(
        "--chat-tokens",
        default=0,
        show_default=True,
        type=click.IntRange(min=0),
        help="Tokens of conversations that the base writes first; keeps its manners.",
    )
    @click.option(
        "--init",
        "initial",
        type=click.Path(path_type=Path),
        help="Blocks to start from (default: fresh ones).",
    )
    @click.option(
        "--epochs", default=1, show_default=True, type=click.IntRange(min=1), help="How often over the data."
    )
    @click.option(
        "--steps", type=click.IntRange(min=1), help="Stop after this many (default: when the data ends)."
    )
    @click.option(
        "--learning-rate",
        "learning_rates",
        multiple=True,
        default=(2e-3,),
        show_default=True,
        type=click.FloatRange(min=0, min_open=True),
        help="Give several, and the one with the lowest validation loss after a short run is taken.",
    )
    @click.option(
        "--sweep-steps",
        default=30,
        show_default=True,
        type=click.IntRange(min=8),
        help="Length of such a short run.",
    )
    @SEED_OPTION
    @DEVICE_OPTION
    @THREADS_OPTION
    @DATA_DIR_OPTION
    def command(data_dir: Path | None, device: str, threads: int, **job: Any) -> None:
        from server.offline import TrainingJob, train_variant

        with errors_shown():
            directory = checked_settings(None, data_dir=data_dir).data_dir
            train_variant(name, TrainingJob(**job), directory, device, threads)

    return command


for _name in VARIANTS:
    _variant(_name)


@train.command()
@click.option(
    "--domain",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of UTF-8 text; a tenth is held out.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Safetensors file to write.")
@click.option(
    "--experts", "count", default=4, show_default=True, type=click.IntRange(1, 1024), help="New ones a layer."
)
@click.option(
    "--blocks",
    type=click.Path(path_type=Path),
    help="Blocks of `some` they stand beside (default: the shipped).",
)
@click.option(
    "--layer",
    "layers",
    multiple=True,
    type=click.IntRange(min=0),
    help="May be given several times (default: the layers whose keys move by default).",
)
@STEPS_OPTION
@click.option(
    "--learning-rate",
    default=5e-3,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Of AdamW.",
)
@click.option("--with-keys", is_flag=True, help="Also write where they were found in training.")
@RUN_OPTION
@SEED_OPTION
@DEVICE_OPTION
@THREADS_OPTION
@DATA_DIR_OPTION
def experts(data_dir: Path | None, device: str, threads: int, **job: Any) -> None:
    """Train a few new experts on your own text.

    The router and the experts that are there stay as they are. Without --with-keys the file holds no addresses: the server draws random ones, and serving finds better.
    """
    from server.offline_experts import ExpertsJob, train_new_experts

    with errors_shown():
        directory = checked_settings(None, data_dir=data_dir).data_dir
        train_new_experts(ExpertsJob(**job), directory, device, threads)
