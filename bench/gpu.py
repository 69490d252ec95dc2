"""Decoding on a GPU: tokens a second by streams, and how near that is to what reading the memory alone would allow.

    python bench/gpu.py [--variants dense some moe] [--streams 1 8 64 256] [--context 256] [--steps 64] [--profile]

A step is one of the engine, without HTTP: scheduling, the recorded call, choosing, delivery. The memory limit is the
bandwidth of copying one large tensor to another, measured here, over the bytes that a step cannot do without: the
layers' weights and the output head once, the experts that may be selected, and keys and values of every stream's text.
With --profile one more step of each is traced: what the device computed in it, in how many kernels and which of them took
longest. The rest of a step is the host's.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_data_path
from profile_step import WAITING, sequences
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from model.blocks.base import ExpertUsage
from model.checkpoints.blocks import load_blocks, shipped_folder
from model.checkpoints.load import find_base_file, load_base
from model.keys import AnchorKeys, KeyView
from model.transformer import Transformer, Variant
from server.engine.counters import Observers
from server.engine.engine import Engine
from server.engine.scheduler import SchedulerConfig

COPIED_BYTES, COPIES = 1 << 30, 10
WARM_UP = 4  # steps; the first records
LONGEST = 8  # kernels that are told by name


@dataclass(frozen=True)
class DeviceWork:
    """What the device did in one step."""

    milliseconds: float
    kernels: int
    longest: list[tuple[str, float, int]]  # name, milliseconds and calls of kernels alike

    @classmethod
    def of(cls, events: Iterable[Any]) -> "DeviceWork":
        """From a profiler's events, of which those on the device count."""
        spent, calls = Counter[str](), Counter[str]()
        for event in events:
            if event.device_type == DeviceType.CUDA:
                spent[event.name] += event.time_range.elapsed_us() / 1e3
                calls[event.name] += 1
        longest = [(name, ms, calls[name]) for name, ms in spent.most_common(LONGEST)]
        return cls(spent.total(), calls.total(), longest)

    def told(self, title: str) -> str:
        lines = (f"  {ms:7.3f} ms {calls:5} x {name[:90]}" for name, ms, calls in self.longest)
        return "\n".join(itertools.chain((f"{title}: longest kernels of a step",), lines))


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(COPIES):
        target.copy_(source)
    torch.cuda.synchronize(device)
    return 2 * COPIED_BYTES * COPIES / (time.perf_counter() - started)


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def bytes_a_step(model: Transformer, variant: Variant | None, streams: int, context: int) -> int:
    """What has to be read for one token of every stream, `context` tokens behind it."""
    config = model.config
    matrices = [
        projection.weight
        for layer in model.layers
        for projection in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
        if projection is not None
    ]
    read = size(model.head) + sum(size(matrix) for matrix in matrices)
    of_a_token = 2 * config.num_hidden_layers * config.key_value_size * model.embedding.element_size()
    for block in variant.blocks.values() if variant else ():
        selected = min(1.0, streams * block.config.num_experts_per_tok / block.config.num_experts)
        read += sum(
            int(size(parameter) * (selected if name.startswith("experts.") else 1))
            for name, parameter in block.named_parameters()
        )
    return read + streams * context * of_a_token


def step_seconds(
    model: Transformer,
    name: str,
    variant: Variant | None,
    keys: KeyView | None,
    streams: int,
    context: int,
    steps: int,
    *,
    traced: bool = False,
) -> tuple[float, DeviceWork | None]:
    """The median step once all streams write, and of one more, if it is to be `traced`, the device's part."""
    room = streams * (context + steps + WARM_UP + 1 + WAITING + 64)
    scheduler = SchedulerConfig(max_running=streams, step_tokens=8192)
    nobody = Observers(*[lambda endpoint, seconds: None] * 4)
    variants = {name: variant} if variant else {}
    engine = Engine(model, variants, scheduler, room, {name: frozenset()}, time.monotonic, nobody)
    engine.scheduler.waiting.extend(sequences(streams, name, keys, context, steps + WARM_UP + 1))
    while engine.scheduler.waiting or not all(s.decoding for s in engine.scheduler.running):
        engine.step()
    spent: list[float] = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        engine.step()  # ends with the tokens on the host
        spent.append(time.perf_counter() - started)
    assert len(engine.scheduler.running) == streams, "all streams write to the end"
    work = None
    if traced:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            engine.step()
        work = DeviceWork.of(trace.events() or ())
    return statistics.median(spent[WARM_UP:]), work


def variant_of(name: str, model: Transformer) -> tuple[Variant | None, KeyView | None]:
    """The shipped blocks on the model's device, with their anchors where they have some."""
    if name == "dense":
        return None, None
    folder = load_blocks(shipped_folder(name), model.config.hidden_size)
    anchors = {
        layer: block.anchors.detach().numpy()
        for layer, block in folder.blocks.items()
        if hasattr(block, "anchors")
    }
    for block in folder.blocks.values():
        block.to(model.device)
    return Variant(folder.blocks, ExpertUsage.of(folder.config)), AnchorKeys(anchors) if anchors else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["dense", "some", "moe"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--profile", action="store_true", help="trace one more step of each")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data-dir", type=Path, default=user_data_path("libration"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: nothing was measured")
    device = torch.device(arguments.device)
    base = load_base(find_base_file(), torch.bfloat16, arguments.data_dir / "cache", arguments.device)
    limit = bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}, copies at {limit / 1e9:.0f} GB/s\n")
    columns = ["variant", "streams", "ms a step", "tokens/s", "MB a step", "of the memory limit"]
    columns += ["ms on the device", "kernels"] if arguments.profile else []
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    works: list[tuple[str, DeviceWork]] = []
    for name in arguments.variants:
        variant, keys = variant_of(name, base.transformer)
        for streams in arguments.streams:
            given = base.transformer, name, variant, keys, streams, arguments.context, arguments.steps
            seconds, work = step_seconds(*given, traced=arguments.profile)
            read = bytes_a_step(
                base.transformer, variant, streams, arguments.context + WARM_UP + arguments.steps // 2
            )
            cells = [name, str(streams), f"{1e3 * seconds:.2f}", f"{streams / seconds:.0f}"]
            cells += [f"{read / 1e6:.0f}", f"{read / limit / seconds:.0%}"]
            if work is not None:
                cells += [f"{work.milliseconds:.2f}", str(work.kernels)]
                works.append((f"{name}, {streams} streams", work))
            print(f"| {' | '.join(cells)} |", flush=True)
    for title, work in works:
        print(f"\n{work.told(title)}")


if __name__ == "__main__":
    main()
