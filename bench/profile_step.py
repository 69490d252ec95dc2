"""Where a decode step goes: milliseconds of each part of a step of the engine, without HTTP.

    python bench/profile_step.py [--streams 1 8] [--threads 2] [--context 128] [--steps 40]

Every part is the median over the steps. Times are the engine thread's own processor time with one thread, which other
processes disturb little, and wall-clock time with more. "products" are the packed products alone, run beside the steps
on the same matrices; they are part of "layers". So are the blocks of some and moe, as far as compiled code takes them.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_data_path

from keystore.index import KeyIndex
from model.blocks.base import ExpertUsage
from model.checkpoints.blocks import load_blocks, shipped_folder
from model.checkpoints.load import find_base_file, load_base
from model.native.decoder import MATRICES
from model.native.product import product_4bit
from model.sampling import SamplingParams
from model.transformer import Transformer, Variant
from server.engine import engine as engine_module
from server.engine.choosing import choose
from server.engine.engine import Engine, Observers
from server.engine.scheduler import SchedulerConfig
from server.engine.sequence import Sequence

PARTS = ("layers", "products", "head", "blocks", "search", "choose", "rest of the step", "step")
WAITING = 512  # tokens that a stream may write before the others' prompts are read
VARIANTS = ("dense", "some", "moe", "mom", "fm-moe")


class Anchors:
    """The anchors, searched as the key store does."""

    version = 0

    def __init__(self, blocks: dict[int, Any]):
        self._indexes = {layer: KeyIndex(block.anchors.numpy()) for layer, block in blocks.items()}

    def keys_of(self, layer: int) -> Any:
        return self._indexes[layer].keys

    def visible_ids(self, layer: int) -> None:
        return None

    def search(self, layer: int, queries: Any, k: int) -> Any:
        return self._indexes[layer].search(queries, k)


class Parts:
    """Sums the time of whole calls, by part, within one step."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.spent: dict[str, float] = defaultdict(float)

    def watch(
        self, owner: Any, name: str, part: str, whole: Callable[[Any], Any] = lambda result: result
    ) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            started = self.clock()
            try:
                return whole(original(*arguments, **named))
            finally:
                self.spent[part] += self.clock() - started

        setattr(owner, name, watched)


def sequences(count: int, variant: str, keys: Any, context: int, steps: int) -> list[Sequence]:
    """They write `steps` tokens once all of them write, and up to WAITING before."""
    return [
        Sequence(
            sequence_id=str(i),
            prompt_token_ids=tuple(1000 + 7 * i + j for j in range(context)),
            params=SamplingParams(max_tokens=steps + WAITING, temperature=0.0, ignore_eos=True),
            endpoint=variant,
            variant=None if variant == "dense" else variant,
            keys=keys,
            teach=None,
            deliver=lambda event: None,
            eos_token_id=2,
            arrived_at=0.0,
        )
        for i in range(count)
    ]


def products_alone(model: Transformer, rows: int, clock: Callable[[], float]) -> float:
    """Seconds of all layers' products, on one thread."""
    assert model.decoder is not None, "this processor has no AVX-512 VNNI"
    stacked = dict(zip(MATRICES, model.decoder.matrices, strict=False))
    room = model.decoder.room(rows, 1)
    room[0].fill(1)
    room[1].fill(1.0)
    outputs = {"qkv_proj": room[2], "o_proj": room[3], "gate_up_proj": room[2], "down_proj": room[3]}
    started = clock()
    for layer in range(len(model.layers)):
        for name, matrices in stacked.items():
            product_4bit(matrices[layer], 0, len(matrices[layer]), room[0], room[1], outputs[name])
    return clock() - started


def profile(
    model: Transformer, variant: str, streams: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """Milliseconds of each part of a step."""
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    variants, keys = {}, None
    if variant != "dense":
        folder = load_blocks(shipped_folder(variant), model.config.hidden_size)
        variants[variant] = Variant(folder.blocks, ExpertUsage.of(folder.config))
        keys = Anchors(folder.blocks) if variant == "some" else None
    nobody = Observers(*[lambda endpoint, seconds: None] * 4)
    engine = Engine(
        model,
        variants,
        SchedulerConfig(max_running=64),
        65_536,
        {variant: frozenset()},
        time.monotonic,
        nobody,
    )
    engine.scheduler.waiting.extend(sequences(streams, variant, keys, arguments.context, arguments.steps))
    while not all(s.decoding for s in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    parts = Parts(clock)
    parts.watch(model.decoder, "layers", "layers")
    parts.watch(model.decoder, "logits", "head")
    parts.watch(engine_module, "choose", "choose", list)
    for block in variants[variant].blocks.values() if variants else ():
        parts.watch(block, "serve", "blocks")
    if keys is not None:
        parts.watch(keys, "search", "search")
    measured: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(arguments.steps):
        parts.spent.clear()
        started = clock()
        engine.step()
        parts.spent["step"] = clock() - started
        inside = sum(parts.spent[part] for part in ("layers", "head", "blocks", "choose"))
        parts.spent["rest of the step"] = parts.spent["step"] - inside
        parts.spent["products"] = products_alone(model, streams, clock)
        for part in PARTS:
            measured[part].append(1e3 * parts.spent[part])
    del model.decoder.layers, model.decoder.logits  # the watched ones
    engine_module.choose = choose
    return {part: statistics.median(values) for part, values in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--data-dir", type=Path, default=user_data_path("libration"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_base(find_base_file(), torch.bfloat16, arguments.data_dir / "cache").transformer
    print(f"| ms a step | streams | {' | '.join(PARTS)} |\n|{'---|' * (2 + len(PARTS))}")
    for variant in arguments.variants:
        for streams in arguments.streams:
            spent = profile(model, variant, streams, arguments)
            cells = " | ".join(f"{spent[part]:.2f}" for part in PARTS)
            print(f"| {variant} | {streams} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
