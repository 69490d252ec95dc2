"""An endpoint's key store as its settings want it: in a file of this server, or in a Redis that several share."""

import hashlib
import time
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from keystore.backends.embedded import EmbeddedBackend
from keystore.backends.redis_model import ModelCard
from keystore.canary import Guard
from keystore.learning_side import StoreParts
from keystore.records import Float32Array
from keystore.replica import Replica
from keystore.replica_backend import ReplicaBackend
from keystore.store import KeyStore
from keystore.worker import ConsolidationWorker
from model.blocks.some import SomeBlock
from model.checkpoints.blocks import BlockFolder
from server.redis_access import open_client, seal_of
from server.settings import Settings


class Background(Protocol):
    """What a store needs to have running."""

    def start(self) -> None:
        """Run in threads of its own until `stop`."""
        ...

    def stop(self, *, flush: bool = True) -> None:
        """End them; with `flush` nothing that waits is lost if it can be helped."""
        ...


def open_store(
    name: str, settings: Settings, folder: BlockFolder, layers: Collection[int], guard: Guard | None
) -> tuple[KeyStore, Background]:
    """An endpoint's keys, of which those in `layers` move, and what keeps them moving, not started yet.

    Raises as KeyStore does, and OSError.
    """
    if settings.key_store.backend == "redis":
        return _open_replica(name, settings, folder, layers, guard)
    backend = EmbeddedBackend(settings.data_dir / "keys" / f"keys-{name}.sqlite3")
    try:
        store = open_key_store(name, settings, folder, layers, backend, guard)
    except BaseException:
        backend.close()
        raise
    return store, ConsolidationWorker(store, time.time)


def open_key_store(
    name: str,
    settings: Settings,
    folder: BlockFolder,
    layers: Collection[int],
    backend: EmbeddedBackend,
    guard: Guard | None = None,
) -> KeyStore:
    """An endpoint's keys in a file, on the anchors in its blocks; raises as KeyStore does."""
    limits = settings.key_store
    return KeyStore(
        _model_id(folder),
        _anchors_of(folder),
        backend=backend,
        plastic_layers=layers,
        queue_size=limits.queue_windows,
        versions_on_disk=limits.versions_on_disk,
        session_ttl_s=limits.session_ttl_s,
        session_eviction=limits.session_eviction,
        guard=guard,
        **_common(name, settings, folder),
    )


def _open_replica(
    name: str, settings: Settings, folder: BlockFolder, layers: Collection[int], guard: Guard | None
) -> tuple[KeyStore, Replica]:
    shared = settings.key_store
    card = ModelCard(
        endpoint=name,
        model_id=_model_id(folder),
        num_experts_per_tok=folder.config.num_experts_per_tok,
        plastic_layers=tuple(sorted(layers)),
        anchors=_anchors_of(folder),
    )
    backend = ReplicaBackend(open_client(shared), card, seal_of(shared), shared.shards)
    made: list[Replica] = []

    def replica(parts: StoreParts) -> Replica:
        scopes, ttl_s = shared.queue_windows, shared.session_ttl_s
        everybodys = settings.endpoints[name].learn_scope == "global"
        made.append(
            Replica(parts, backend, outbox_scopes=scopes, session_ttl_s=ttl_s, learn_global=everybodys)
        )
        return made[0]

    try:
        store = KeyStore(
            card.model_id,
            card.anchors,
            backend=backend,
            plastic_layers=layers,
            versions_on_disk=shared.versions_on_disk,
            guard=guard,
            learning_side=replica,
            **_common(name, settings, folder),
        )
    except BaseException:
        backend.close()
        raise
    return store, made[0]


def _common(
    name: str, settings: Settings, folder: BlockFolder
) -> dict[str, Any]:  # Any: arguments of KeyStore
    endpoint, limits = settings.endpoints[name], settings.key_store
    return {
        "gravity": endpoint.gravity.config(),
        "num_experts_per_tok": folder.config.num_experts_per_tok,
        "versions_in_memory": limits.versions_in_memory,
        "max_sessions": limits.max_sessions,
        "exact_limit": limits.exact_limit,
    }


def _anchors_of(folder: BlockFolder) -> Mapping[int, Float32Array]:
    return {
        layer: block.anchors.detach().float().cpu().numpy()
        for layer, block in folder.blocks.items()
        if isinstance(block, SomeBlock)
    }


def _model_id(folder: BlockFolder) -> str:
    """A fingerprint of the frozen blocks: keys learned for other experts must never be adopted."""
    if folder.fingerprint:
        return folder.fingerprint
    digest = hashlib.sha256()
    for layer in sorted(folder.blocks):
        for name, parameter in folder.blocks[layer].named_parameters():
            digest.update(f"{layer}.{name}".encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
