"""From settings to a running server: load weights, open key stores, start the engine; and the way back.

The one place that knows every part.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from keystore.backends.data_file import make_folder
from keystore.store import KeyStore
from model.blocks.base import BlockConfig, ExpertUsage
from model.blocks.compiled_block import CompiledBlock
from model.checkpoints.blocks import BlockFolder, load_blocks, read_config, shipped_folder
from model.checkpoints.hf_folder import read_routing
from model.checkpoints.load import BaseModel, find_base_file, load_base, load_checkpoint
from model.errors import CheckpointError
from model.transformer import Transformer, Variant
from server.added_experts import AddedExperts
from server.canary_probe import make_guard
from server.engine.counters import Observers
from server.engine.engine import Engine
from server.engine.runner import EngineRunner
from server.engine.scheduler import SchedulerConfig
from server.expert_files import kept_folder, plastic_blocks
from server.key_stores import Background, open_store
from server.own_models import anchor_keys, kind_of, own_blocks
from server.plasticity import Teacher
from server.registry import Endpoint, Plasticity, Registry
from server.settings import Settings
from server.settings_endpoint import EndpointSettings
from server.value_offsets import OffsetLimits, ValueOffsets

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CONSOLIDATION_STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that was started, for whoever has to stop it."""

    registry: Registry
    workers: tuple[Background, ...]
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
    engines = [
        _build_engine(settings, place, names, threads, observers, progress)
        for place, names in _names_by_place(settings).items()
    ]
    built = {name: endpoint for endpoints in engines for name, endpoint in endpoints.items()}
    registry = Registry(
        {name: built[name] for name in settings.endpoints},
        tuple(next(iter(endpoints.values())).runner for endpoints in engines),
    )
    plastic = [each.plasticity for each in registry.endpoints.values() if each.plasticity is not None]
    workers = tuple(each.background for each in plastic if each.background is not None)
    return Parts(registry, workers, tuple(each.store for each in plastic))


@dataclass(frozen=True, slots=True)
class Place:
    """A base in memory: which one, and where it computes."""

    device: torch.device
    model: Path | None  # None: the base that comes with Libration


def _names_by_place(settings: Settings) -> dict[Place, list[str]]:
    """Endpoints by the base that they share, in the order of the configuration. Raises ValueError."""
    by_place: dict[Place, list[str]] = {}
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
        by_place.setdefault(Place(device, endpoint.model), []).append(name)
    return by_place


def _build_engine(
    settings: Settings,
    place: Place,
    names: list[str],
    threads: int,
    observers: Observers,
    progress: Callable[[int, int], None],
) -> dict[str, Endpoint]:
    """One base in memory and one engine for all endpoints of a place."""
    engine_settings = settings.engine
    base = open_base(
        place.model, DTYPES[engine_settings.dtype], settings.data_dir / "cache", str(place.device), progress
    )
    model = base.transformer
    loaded: dict[str, BlockFolder] = {}
    for name in names:
        folder = load_variant(settings.endpoints[name], base)
        if folder is not None:
            loaded[name] = folder
    plastic = {
        name: plastic_layers_of(settings.endpoints[name], folder.config)
        for name, folder in loaded.items()
        if settings.endpoints[name].has_keys
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
        engine_settings.prefix_cache_tokens,
    )
    runner = EngineRunner(engine, threads)
    created = int(time.time())
    endpoints = {
        name: Endpoint(
            name=name,
            variant=kind_of(settings.endpoints[name], loaded.get(name)),
            created=created,
            tokenizer=base.tokenizer,
            runner=runner,
            max_model_len=min(model.config.max_position_embeddings, engine.cache.capacity_tokens),
            eos_token_id=model.config.eos_token_id,
            usage=variants[name].usage if name in variants else None,
            plasticity=_open_plasticity(name, settings, base, loaded[name], runner)
            if name in plastic
            else None,
            fixed_keys=anchor_keys(loaded[name])
            if name in loaded and name not in plastic and base.blocks
            else None,
            end_token_ids=base.end_token_ids,
        )
        for name in names
    }
    if model.decoder is not None:
        _prepare(variants.values())
    return endpoints


def _prepare(variants: Iterable[Variant]) -> None:
    """Copy the weights of blocks for compiled code before the first token is written."""
    for variant in variants:
        for block in variant.blocks.values():
            if isinstance(block, CompiledBlock):
                block.compiled_weights()


def open_base(
    model: Path | None,
    dtype: torch.dtype,
    cache_dir: Path,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BaseModel:
    """A model of one's own, or the base that comes with Libration. Raises CheckpointError."""
    if model is not None:
        return load_checkpoint(model, dtype, cache_dir, device, progress)
    return load_base(find_base_file(), dtype, cache_dir, device, progress)


def load_variant(endpoint: EndpointSettings, base: BaseModel) -> BlockFolder | None:
    """The endpoint's blocks on the base's device; None for a base as it is. Raises CheckpointError, ValueError."""
    if endpoint.variant == "checkpoint":
        return own_blocks(endpoint, base)
    if base.blocks:
        raise ValueError(f"{endpoint.model} has experts of its own: leave out variant {endpoint.variant!r}")
    if endpoint.variant == "dense":
        return None
    folder = read_variant(endpoint, base.transformer.config.hidden_size)
    for block in folder.blocks.values():
        block.to(base.transformer.device)
    return folder


def read_variant(endpoint: EndpointSettings, hidden_size: int | None = None) -> BlockFolder:
    """The endpoint's blocks for a base of `hidden_size` (None: whatever they are for).

    Of a checkpoint's own experts the routing alone. Raises CheckpointError, also for blocks of another kind.
    """
    if endpoint.variant == "checkpoint":
        assert endpoint.model is not None, endpoint
        return read_routing(endpoint.model)
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
    layers = plastic_layers_of(endpoint, folder.config)
    guard = make_guard(settings.guard, base, folder.blocks, layers)
    store, worker = open_store(name, settings, folder, layers, guard)
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
        store.news.replaced.add(offsets.drop)
    return Plasticity(store, teacher, experts, endpoint.plasticity, endpoint.learn_scope, offsets, worker)


def _value_offsets(settings: Settings, endpoint: EndpointSettings, model: Transformer) -> ValueOffsets:
    wanted, sessions = endpoint.value_offsets, settings.key_store
    window_tokens = endpoint.gravity.window_tokens
    limits = OffsetLimits(
        wanted.rate, wanted.bound, window_tokens, sessions.max_sessions, sessions.session_ttl_s
    )
    return ValueOffsets(model, limits)
