"""The worker process: learns until a signal, then ends after the commits at hand and gives its leases back."""

import logging
import signal
import threading
from types import FrameType

import click
from prometheus_client import CollectorRegistry

from keystore.errors import StoreUnavailable
from server.logs import configure_logging
from server.redis_access import open_client
from server.settings import Settings
from server.worker.metrics import WorkerCollector
from server.worker.models import WorkedModels
from server.worker.status import StatusServer

LOOK_EVERY_S = 1.0  # for models that a server has brought

logger = logging.getLogger(__name__)


def work_until_signal(settings: Settings) -> None:
    """Learn every configured endpoint's keys; comes back after SIGTERM or SIGINT."""
    configure_logging()
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, stop)
    try:
        client = open_client(settings.key_store)
        models = WorkedModels(client, settings)
        registry = CollectorRegistry()
        registry.register(WorkerCollector(models))
        status = StatusServer(
            settings.worker.host,
            settings.worker.port,
            registry,
            live=lambda: None if models.alive else "a model's leases are not looked after",
            ready=lambda: None if models.in_touch else "Redis does not answer",
        )
    except OSError as error:
        raise click.ClickException(str(error)) from error
    status.start()
    click.echo(
        f"Libration worker {models.name} on {settings.key_store.url}, metrics on"
        f" http://{settings.worker.host}:{status.port}/metrics",
        err=True,
    )
    reachable = True
    while not stopping.is_set():
        try:
            models.look()
            reachable = True
        except StoreUnavailable as error:
            if reachable:
                logger.warning("no news of models: %s", error)
            reachable = False
        stopping.wait(LOOK_EVERY_S)
    models.stop()
    status.stop()
    client.close()
