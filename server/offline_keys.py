"""An endpoint's keys opened for the command line while no server has them; faults become messages.

Nothing here imports torch or FAISS before it must: `libration serve` prepares the process for them first.
"""

from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from keystore.backends.embedded import EmbeddedBackend
from keystore.errors import KeyStoreError, StoreLocked
from server.settings import Settings

if TYPE_CHECKING:
    from keystore.store import KeyStore


@contextmanager
def stored_keys(settings: Settings, endpoint: str) -> Generator[EmbeddedBackend]:
    """What is on disk, as it is: needs no weights."""
    with _errors_shown(), closing(_open_backend(settings, endpoint)) as backend:
        yield backend


@contextmanager
def key_store(settings: Settings, endpoint: str, *, may_create: bool = False) -> Generator["KeyStore"]:
    """The endpoint's keys on its anchors, which lie with the weights."""
    with _errors_shown():
        backend = _open_backend(settings, endpoint, may_create=may_create)
        try:
            from server.build import plastic_layers_of, read_variant  # torch takes seconds to import
            from server.key_stores import open_key_store

            configured = settings.endpoints[endpoint]
            folder = read_variant(configured)
            layers = plastic_layers_of(configured, folder.config)
            store = open_key_store(endpoint, settings, folder, layers, backend)
        except BaseException:
            backend.close()
            raise
        with closing(store):
            yield store


def _open_backend(settings: Settings, endpoint: str, *, may_create: bool = False) -> EmbeddedBackend:
    allowed = plastic_endpoints(settings)
    if endpoint not in allowed:
        raise click.ClickException(
            f"{endpoint!r} has no routing keys; endpoints that have: {', '.join(allowed) or 'none'}"
        )
    if settings.key_store.backend == "redis":
        raise click.ClickException(
            f"these keys are in Redis, which several servers share. Ask one of them: /v1/keys/{endpoint} shows"
            f" them, /admin/keys/{endpoint} changes them"
        )
    path = file_of(settings, endpoint)
    if not may_create and not path.exists():
        raise click.ClickException(f"{endpoint!r} has learned nothing yet: there is no {path}")
    try:
        return EmbeddedBackend(path)
    except StoreLocked as error:
        raise click.ClickException(
            f"a running server holds these keys ({error}). Stop it first, or ask it: /v1/keys/{endpoint} shows"
            f" them, /admin/keys/{endpoint} changes them"
        ) from error


@contextmanager
def _errors_shown() -> Generator[None]:
    from model.errors import ModelError

    try:
        yield
    except (KeyStoreError, ModelError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def plastic_endpoints(settings: Settings) -> list[str]:
    """Configured endpoints that have routing keys."""
    return [name for name, endpoint in settings.endpoints.items() if endpoint.has_keys]


def file_of(settings: Settings, endpoint: str) -> Path:
    """Where the server keeps an endpoint's keys."""
    return settings.data_dir / "keys" / f"keys-{endpoint}.sqlite3"
