"""The sweeps of bench/scale.py: which rows, at which sizes. See there for what they mean."""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from libration_server import token_ids
from scale_report import Sweep
from scale_steps import RandomExperts, anchor_view, full_caches, reading_speed, scope_view, writing_speed

from keystore.records import Float32Array
from keystore.snapshot import KeySnapshot
from model.blocks.base import BlockConfig
from model.transformer import Transformer, Variant
from server.engine.scheduler import SchedulerConfig

STREAM_MODES = ("dense", "some, learning off", "some, learning")
STREAM_PROMPT, STREAM_NEW = 32, 32
SHORT_CONTEXT = 128  # where context is not what is measured
BATCH = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured, and over how many steps."""

    streams: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    experts: tuple[int, ...] = (16, 64, 256, 1024, 4096, 16_384)
    scopes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    steps: int = 20
    short_steps: int = 8  # of a batch of as many sequences as the most scopes


QUICK = Sizes(
    streams=(1, 4), contexts=(256, 512), experts=(16, 256), scopes=(1, 4, 8), steps=4, short_steps=2
)
Measure = Callable[[int], float]  # size -> tokens/s


def sweep(title: str, size: str, columns: Sequence[int], rows: Mapping[str, Measure], rounds: int) -> Sweep:
    """Every row at every column, in turns; the first round warms up what is cheap, its smallest column."""
    measured: dict[str, list[list[float]]] = {name: [] for name in rows}
    for measure in rows.values():
        measure(columns[0])
    for number in range(rounds):
        for each in measured.values():
            each.append([])
        for column in columns:
            for name, measure in rows.items():
                measured[name][-1].append(measure(column))
        print(f"{size}: round {number + 1} of {rounds}", file=sys.stderr)
    medians = {
        name: [statistics.median(by_round) for by_round in zip(*each, strict=True)]
        for name, each in measured.items()
    }
    return Sweep(title, size, columns, medians)


def over_streams(
    generate: Callable[[list[list[int]], str], float], sizes: Sizes, rounds: int, modes: Sequence[str]
) -> Sweep:
    """`generate` answers prompts in a mode, STREAM_NEW tokens each, and returns the seconds."""
    seeds = iter(range(1_000_000))  # no prompt twice

    def rate(mode: str, streams: int) -> float:
        prompts = [token_ids(STREAM_PROMPT, next(seeds)) for _ in range(streams)]
        return streams * STREAM_NEW / generate(prompts, mode)

    rows = {mode: lambda streams, mode=mode: rate(mode, streams) for mode in modes}
    return sweep("Streams at once, over HTTP", "streams", sizes.streams, rows, rounds)


def over_contexts(model: Transformer, variants: Mapping[str, Variant], sizes: Sizes, rounds: int) -> Sweep:
    caches = full_caches(model, BATCH, max(sizes.contexts))
    chunk = SchedulerConfig().prefill_chunk
    rows: dict[str, Measure] = {}
    for name, variant in {"dense": None, **variants}.items():
        view = None if variant is None else anchor_view(_anchors(variant))
        for count in (1, BATCH):
            views = [] if view is None else [view] * count
            rows[f"{name}, {_streams(count)}"] = lambda context, count=count, variant=variant, views=views: (
                writing_speed(model, caches[:count], context, sizes.steps, variant, views)
            )
        rows[f"{name}, prompt"] = lambda context, variant=variant, view=view: reading_speed(
            model, caches[0], context, chunk, variant, view
        )
    return sweep("Context", "context, tokens", sizes.contexts, rows, rounds)


def over_experts(model: Transformer, config: BlockConfig, sizes: Sizes, rounds: int) -> Sweep:
    experts = RandomExperts(config, max(sizes.experts))
    served = {count: experts.first(count) for count in sizes.experts}
    caches = full_caches(model, BATCH, 2 * SHORT_CONTEXT)

    def writing(count: int, streams: int) -> float:
        variant, view = served[count]
        return writing_speed(model, caches[:streams], SHORT_CONTEXT, sizes.steps, variant, [view] * streams)

    rows: dict[str, Measure] = {
        _streams(streams): lambda count, streams=streams: writing(count, streams) for streams in (1, BATCH)
    }
    rows["prompt of 256"] = lambda count: reading_speed(model, caches[0], 256, 256, *served[count])
    return sweep("Experts a layer, 4 a token", "experts", sizes.experts, rows, rounds)


def over_scopes(model: Transformer, variant: Variant, sizes: Sizes, rounds: int) -> Sweep:
    streams = max(sizes.scopes)
    origin = anchor_view(_anchors(variant))
    views = [scope_view(origin, number) for number in range(streams)]
    caches = full_caches(model, streams, SHORT_CONTEXT)

    def rate(seen: list[KeySnapshot]) -> float:
        return writing_speed(model, caches, SHORT_CONTEXT, sizes.short_steps, variant, seen)

    rows: dict[str, Measure] = {
        "tenant by tenant": lambda scopes: rate([views[i * scopes // streams] for i in range(streams)]),
        "tenants in turns": lambda scopes: rate([views[i % scopes] for i in range(streams)]),
    }
    return sweep(f"Live scopes in one batch of {streams}", "scopes", sizes.scopes, rows, rounds)


def _streams(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"


def _anchors(variant: Variant) -> dict[int, Float32Array]:
    return {layer: block.get_parameter("anchors").numpy() for layer, block in variant.blocks.items()}
