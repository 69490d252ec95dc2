"""`libration serve`: everything brought together, from settings to the last answer."""

import logging
import os
import time
from importlib.metadata import version

import click
import torch

from keystore.errors import KeyStoreError
from model.errors import ModelError
from server.api_key_file import FILE_NAME, digest_of
from server.app import create_app
from server.auth import ApiKey, ApiKeys, StoredApiKeys
from server.build import Parts, build
from server.feedback import AnswerMemory
from server.logs import configure_logging
from server.metrics import Metrics
from server.process import run
from server.progress import conversion_progress
from server.settings import Settings
from server.state import ServerState

logger = logging.getLogger(__name__)


def serve_until_signal(settings: Settings, started: float, processors: set[int]) -> None:
    """Load, listen, and come back when a signal has ended it. `started`: monotonic time of the process's start.

    `processors`: what this process may run on, as it was before torch was imported.
    """
    os.sched_setaffinity(0, processors)  # with OMP_PROC_BIND, importing torch has bound this thread
    configure_logging()
    began, metrics = time.monotonic(), Metrics()
    try:
        api_keys = ApiKeys(
            (ApiKey.limited(digest_of(each.secret()), each) for each in settings.server.api_keys),
            StoredApiKeys(settings.data_dir / FILE_NAME),
        )
        parts = build(settings, metrics.observers(), conversion_progress())
    except (ModelError, KeyStoreError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    # This thread serves HTTP from here on, and the threads that it starts inherit its processors: only the
    # engine's are bound, by their own first product.
    os.sched_setaffinity(0, processors)
    metrics.watch(parts.registry, version("libration"), settings.metrics)
    loaded = time.monotonic()
    metrics.note_startup("import", began - started)
    metrics.note_startup("load", loaded - began)
    state = ServerState(
        registry=parts.registry,
        metrics=metrics,
        version=version("libration"),
        system_fingerprint=f"libration-{version('libration')}-torch-{torch.__version__.partition('+')[0]}",
        started_at=time.time(),
        snapshots_dir=settings.data_dir / "snapshots",
        experts_dir=settings.experts_folder,
        api_keys=api_keys,
        answers=AnswerMemory(settings.feedback.keep_s, settings.feedback.keep_answers),
        degraded=lambda: [*_degraded(parts), *_faults(api_keys)],
        max_body_bytes=settings.server.max_body_bytes,
        public_metrics=settings.server.on_loopback,
    )
    host, port = settings.server.host, settings.server.port

    def announce(bound_port: int) -> None:
        metrics.note_startup("listen", time.monotonic() - loaded)
        names = ", ".join(parts.registry.endpoints)
        click.echo(
            f"Libration {state.version} serves {names} on http://{host}:{bound_port}/v1 "
            f"(ready in {time.monotonic() - started:.1f} s, data in {settings.data_dir})",
            err=True,
        )

    run(create_app(state), parts, host, port, settings.server.drain_timeout_s, announce)


def _degraded(parts: Parts) -> list[str]:
    return [
        f"key store of {name!r}: {type(endpoint.plasticity.store.last_error).__name__}"
        for name, endpoint in parts.registry.endpoints.items()
        if endpoint.plasticity is not None and endpoint.plasticity.store.degraded
    ]


def _faults(api_keys: ApiKeys) -> list[str]:
    return [] if api_keys.fault is None else [f"API key file: {api_keys.fault}"]
