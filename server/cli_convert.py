"""`libration convert`: what a first start would do to the weights, done ahead of it."""

import time
from pathlib import Path

import click

from server.cli_settings import CONFIG_OPTION, checked_settings, errors_shown, own_endpoint
from server.cli_tables import JSON_OPTION, print_table


@click.command()
@CONFIG_OPTION
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the server writes.")
@click.option(
    "--model", type=click.Path(path_type=Path), help="A model of your own, in place of the default ones."
)
@JSON_OPTION
def convert(config_file: Path | None, data_dir: Path | None, model: Path | None, *, as_json: bool) -> None:
    """Convert the weights of all endpoints ahead of the first start.

    GGUF files are converted into the data folder and mapped from there by every start; Hugging Face folders are read
    as they are, which this checks.
    """
    settings = checked_settings(config_file, data_dir=data_dir, endpoints=own_endpoint(model, plastic=False))
    from server.build import DTYPES, make_folder, open_base
    from server.progress import conversion_progress

    rows: list[dict[str, object]] = []
    with errors_shown():
        make_folder(settings.data_dir)
        for path in dict.fromkeys(endpoint.model for endpoint in settings.endpoints.values()):
            started = time.monotonic()
            base = open_base(
                path,
                DTYPES[settings.engine.dtype],
                settings.data_dir / "cache",
                progress=conversion_progress(),
            )
            rows.append(
                {
                    "model": "the base" if path is None else str(path),
                    "layers": base.transformer.config.num_hidden_layers,
                    "dtype": settings.engine.dtype,
                    "seconds": round(time.monotonic() - started, 1),
                }
            )
    print_table(rows, tuple(rows[0]), as_json=as_json)
