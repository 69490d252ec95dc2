"""`libration worker`: the process that learns for the servers of one Redis."""

from pathlib import Path

import click

from server.cli_settings import CONFIG_OPTION, checked_settings


@click.command()
@CONFIG_OPTION
@click.option("--host", help="Address of its metrics and health (default 127.0.0.1).")
@click.option("--port", type=click.IntRange(0, 65535), help="Port of its metrics and health (default 9100).")
def worker(config_file: Path | None, host: str | None, port: int | None) -> None:
    """Learn what servers that share a Redis are taught.

    Needs no weights. Start as many as you like.
    """
    settings = checked_settings(config_file, worker={"host": host, "port": port})
    if settings.key_store.backend != "redis":
        raise click.ClickException(
            "key_store.backend is 'embedded': that server learns by itself. Workers need backend 'redis' and a url"
        )
    # NumPy and FAISS take a while to import: only the commands that need them pay for it.
    from server.worker.process import work_until_signal

    work_until_signal(settings)
