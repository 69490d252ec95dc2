"""From settings to a running server: load weights, open key stores, start the engine; and the way back.

The one place that knows every part.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from keystore.backends.data_file import make_folder
from keystore.backends.embedded import EmbeddedBackend
from keystore.canary import Guard
from keystore.store import KeyStore
from keystore.worker import ConsolidationWorker
from model.blocks.base import BlockConfig, ExpertBlock, ExpertUsage
from model.blocks.some import SomeBlock, SomeConfig
from model.checkpoints.blocks import BlockFolder, load_blocks, read_config, shipped_folder
from model.checkpoints.load import BaseModel, find_base_file, load_base
from model.errors import CheckpointError
from model.transformer import Transformer, Variant
from server.added_experts import AddedExperts
from server.canary_probe import make_guard
from server.engine.engine import Engine, Observers
from server.engine.runner import EngineRunner
from server.engine.scheduler import SchedulerConfig
from server.expert_files import kept_folder, plastic_blocks
from server.plasticity import Teacher
from server.registry import Endpoint, Plasticity, Registry
from server.settings import EndpointSettings, Settings
from server.value_offsets import OffsetLimits, ValueOffsets

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CONSOLIDATION_STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that was started, for whoever has to stop it."""

    registry: Registry
    workers: tuple[ConsolidationWorker, ...]
    stores: tuple[KeyStore, ...]

    def start(self) -> None:
        for runner in self.registry.runners:
            runner.start()
        for worker in self.workers:
            worker.start()

    def stop(self, timeout_s: float) -> bool:
        """Finish running answers, learn what is still queued, close the stores. True if nothing was cut off."""
        finished = True
        for runner in self.registry.runners:
            finished &= runner.stop(timeout_s)
        for endpoint in self.registry.endpoints.values():
            if endpoint.plasticity is not None:
                endpoint.plasticity.teacher.close()
        for worker in self.workers:
            worker.stop(flush=True)
        for store in self.stores:
            store.close()
        return finished


def build(
    settings: Settings, observers: Observers, progress: Callable[[int, int], None] = lambda done, total: None
) -> Parts:
    """Load everything that the settings name. Raises ModelError and KeyStoreError with what to do about it."""
    threads = settings.engine.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    make_folder(settings.data_dir)
    on_device = {
        device: _build_engine(settings, device, names, threads, observers, progress)
        for device, names in _names_by_device(settings).items()
    }
    built = {name: endpoint for endpoints in on_device.values() for name, endpoint in endpoints.items()}
    registry = Registry(
        {name: built[name] for name in settings.endpoints},
        tuple(next(iter(endpoints.values())).runner for endpoints in on_device.values()),
    )
    stores = tuple(e.plasticity.store for e in registry.endpoints.values() if e.plasticity is not None)
    return Parts(registry, tuple(ConsolidationWorker(store, time.time) for store in stores), stores)


def _names_by_device(settings: Settings) -> dict[torch.device, list[str]]:
    """Endpoints by where they compute, in the order of the configuration. Raises ValueError."""
    by_device: dict[torch.device, list[str]] = {}
    for name, endpoint in settings.endpoints.items():
        wanted = endpoint.device or settings.engine.device
        try:
            device = torch.device(wanted)
        except RuntimeError as error:
            raise ValueError(
                f"endpoint {name!r}: {wanted!r} is no device; allowed: cpu, cuda, cuda:0"
            ) from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"endpoint {name!r}: there is no CUDA device here; allowed: cpu")
        by_device.setdefault(device, []).append(name)
    return by_device


def _build_engine(
    settings: Settings,
    device: torch.device,
    names: list[str],
    threads: int,
    observers: Observers,
    progress: Callable[[int, int], None],
) -> dict[str, Endpoint]:
    """One base in memory and one engine for all endpoints of a device."""
    engine_settings = settings.engine
    base = load_base(
        find_base_file(),
        DTYPES[engine_settings.dtype],
        settings.data_dir / "cache",
        str(device),
        progress,
    )
    model = base.transformer
    loaded = {
        name: _load_variant(settings.endpoints[name], model)
        for name in names
        if settings.endpoints[name].variant != "dense"
    }
    plastic = {
        name: plastic_layers_of(settings.endpoints[name], folder.config)
        for name, folder in loaded.items()
        if isinstance(folder.config, SomeConfig)
    }
    variants = {
        name: Variant(folder.blocks, ExpertUsage.of(folder.config)) for name, folder in loaded.items()
    }
    engine = Engine(
        model,
        variants,
        SchedulerConfig(
            engine_settings.max_running,
            engine_settings.max_waiting,
            engine_settings.prefill_chunk,
            engine_settings.step_tokens,
        ),
        engine_settings.kv_cache_tokens,
        plastic,
        time.monotonic,
        observers,
    )
    runner = EngineRunner(engine, threads)
    created = int(time.time())
    return {
        name: Endpoint(
            name=name,
            variant=settings.endpoints[name].variant,
            created=created,
            tokenizer=base.tokenizer,
            runner=runner,
            max_model_len=min(model.config.max_position_embeddings, engine.cache.capacity_tokens),
            eos_token_id=model.config.eos_token_id,
            usage=variants[name].usage if name in variants else None,
            plasticity=_open_plasticity(name, settings, base, loaded[name], runner)
            if name in plastic
            else None,
        )
        for name in names
    }


def _load_variant(endpoint: EndpointSettings, model: Transformer) -> BlockFolder:
    """The endpoint's blocks on the model's device. Raises CheckpointError."""
    folder = read_variant(endpoint, model.config.hidden_size)
    for block in folder.blocks.values():
        block.to(model.device)
    return folder


def read_variant(endpoint: EndpointSettings, hidden_size: int | None = None) -> BlockFolder:
    """The endpoint's blocks for a base of `hidden_size` (None: whatever they are for).

    Raises CheckpointError, also for blocks of another kind.
    """
    path = endpoint.weights or shipped_folder(endpoint.variant)
    folder = load_blocks(path, hidden_size or read_config(path).hidden_size)
    if folder.config.kind != endpoint.variant:
        raise CheckpointError(f"{path} holds blocks of kind {folder.config.kind!r}, not {endpoint.variant!r}")
    return folder


def plastic_layers_of(endpoint: EndpointSettings, config: BlockConfig) -> frozenset[int]:
    """The layers whose keys may move: direct credit is exact at the top and poor far below it, gradient anywhere."""
    if endpoint.plastic_layers is None:
        lowest = 0 if endpoint.gravity.rule == "gradient" else len(config.layers) // 2
        return frozenset(config.layers[lowest:])
    unknown = sorted(set(endpoint.plastic_layers) - set(config.layers))
    if unknown:
        raise ValueError(f"plastic_layers {unknown} have no blocks; allowed: {list(config.layers)}")
    return frozenset(endpoint.plastic_layers)


def _open_plasticity(
    name: str, settings: Settings, base: BaseModel, folder: BlockFolder, runner: EngineRunner
) -> Plasticity:
    endpoint = settings.endpoints[name]
    guard = make_guard(settings.guard, base, folder.blocks, plastic_layers_of(endpoint, folder.config))
    backend = EmbeddedBackend(settings.data_dir / "keys" / f"keys-{name}.sqlite3")
    store = open_key_store(name, settings, folder, backend, guard)
    layers = plastic_layers_of(endpoint, folder.config)
    experts = AddedExperts(
        store,
        plastic_blocks(folder.blocks, layers),
        runner.engine.variants[name].usage,
        runner,
        kept_folder(settings, name),
    )
    try:
        experts.put_back()
    except BaseException:
        store.close()
        raise
    teacher = Teacher(base.transformer, store, endpoint.gravity.config(), folder.blocks, layers)
    offsets = None
    if endpoint.value_offsets.enabled:
        offsets = _value_offsets(settings, endpoint, base.transformer)
        store.subscribe_replaced(offsets.drop)
    return Plasticity(store, teacher, experts, endpoint.plasticity, endpoint.learn_scope, offsets)


def _value_offsets(settings: Settings, endpoint: EndpointSettings, model: Transformer) -> ValueOffsets:
    wanted, sessions = endpoint.value_offsets, settings.key_store
    window_tokens = endpoint.gravity.window_tokens
    limits = OffsetLimits(
        wanted.rate, wanted.bound, window_tokens, sessions.max_sessions, sessions.session_ttl_s
    )
    return ValueOffsets(model, limits)


def open_key_store(
    name: str, settings: Settings, folder: BlockFolder, backend: EmbeddedBackend, guard: Guard | None = None
) -> KeyStore:
    """An endpoint's keys on the anchors in its blocks; raises as KeyStore does, and ValueError."""
    anchors = {
        layer: block.anchors.detach().float().cpu().numpy()
        for layer, block in folder.blocks.items()
        if isinstance(block, SomeBlock)
    }
    endpoint, limits = settings.endpoints[name], settings.key_store
    return KeyStore(
        _model_id(folder.blocks),
        anchors,
        endpoint.gravity.config(),
        backend,
        num_experts_per_tok=folder.config.num_experts_per_tok,
        plastic_layers=plastic_layers_of(endpoint, folder.config),
        queue_size=limits.queue_windows,
        versions_in_memory=limits.versions_in_memory,
        versions_on_disk=limits.versions_on_disk,
        max_sessions=limits.max_sessions,
        session_ttl_s=limits.session_ttl_s,
        session_eviction=limits.session_eviction,
        exact_limit=limits.exact_limit,
        guard=guard,
    )


def _model_id(blocks: dict[int, ExpertBlock]) -> str:
    """A fingerprint of the frozen blocks: keys learned for other experts must never be adopted."""
    digest = hashlib.sha256()
    for layer in sorted(blocks):
        for name, parameter in blocks[layer].named_parameters():
            digest.update(f"{layer}.{name}".encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
