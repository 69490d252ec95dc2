"""Throughput against streams, context, experts a layer, and live scopes in one batch.

    python bench/scale.py [--quick] [--only streams context experts scopes] [--rounds 3] [--threads 2] [--out docs/figures]

- streams: over HTTP from a server of our own; 32 new tokens behind a prompt of 32 for each stream, all sent at once,
  timed as a whole.
- context: in process. A text is written on at a context of so many tokens, by itself and with seven more; and a prompt of
  that length is read whole, in the scheduler's chunks.
- experts: in process, random blocks of `some` of the shipped sizes behind the shipped layers, 4 experts a token. All
  layers have the same experts' weights, which for 16,384 are 1.8 GB, and keys of their own, searched as the key store does.
- scopes: in process, 64 sequences of `some` a batch, of so many tenants whose keys have all moved. Sequences lie in the
  batch as they came: tenant by tenant, or in turns.

Writing in process is model and greedy choice, without the engine's own work. Columns and rows take turns within a round;
medians over rounds. Prints markdown tables, writes scale.json and scale.png. About ten minutes on two cores that do nothing else.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import machine
import torch
from libration_server import MODES, LibrationServer, rest_s
from platformdirs import user_data_path
from scale_report import Sweep, draw, table
from scale_sweeps import (
    QUICK,
    STREAM_MODES,
    STREAM_NEW,
    Sizes,
    over_contexts,
    over_experts,
    over_scopes,
    over_streams,
)

from model.blocks.base import ExpertUsage
from model.checkpoints.blocks import load_blocks, shipped_folder
from model.checkpoints.load import find_base_file, load_base
from model.transformer import Variant

SWEEPS = ("streams", "context", "experts", "scopes")


def measure_server(sizes: Sizes, rounds: int, threads: int) -> Sweep:
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        server = LibrationServer(Path(folder), threads, ENGINE__MAX_RUNNING=str(max(sizes.streams)))
        try:

            def generate(prompts: list[list[int]], mode: str) -> float:
                seconds = runner.run(server.generate(prompts, STREAM_NEW, MODES[mode]))
                time.sleep(rest_s(MODES[mode]))
                return seconds

            measured = over_streams(generate, sizes, rounds, STREAM_MODES)
            runner.run(server.client.aclose())
        finally:
            server.stop()
    return measured


def measure_model(sizes: Sizes, arguments: argparse.Namespace) -> Iterator[Sweep]:
    only = set(arguments.only) - {"streams"}
    if not only:
        return
    torch.set_num_threads(arguments.threads)
    model = load_base(find_base_file(), torch.bfloat16, arguments.data_dir / "cache").transformer
    folder = load_blocks(shipped_folder("some"), model.config.hidden_size)
    some = Variant(folder.blocks, ExpertUsage.of(folder.config))
    if "context" in only:
        yield over_contexts(model, {"some": some}, sizes, arguments.rounds)
    if "experts" in only:
        yield over_experts(model, folder.config, sizes, arguments.rounds)
    if "scopes" in only:
        yield over_scopes(model, some, sizes, arguments.rounds)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--quick", action="store_true", help="few small sizes in one round, to see that it runs"
    )
    made.add_argument("--only", nargs="+", default=SWEEPS, choices=SWEEPS)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--out", type=Path, default=Path("docs/figures"))
    made.add_argument(
        "--data-dir", type=Path, default=user_data_path("libration"), help="converted base weights"
    )
    arguments = made.parse_args()
    sizes, arguments.rounds = (QUICK, 1) if arguments.quick else (Sizes(), arguments.rounds)
    described = machine.described(arguments.threads) | {"rounds": str(arguments.rounds)}
    print(machine.lines(described), flush=True)
    measured: list[Sweep] = []
    if "streams" in arguments.only:
        measured.append(measure_server(sizes, arguments.rounds, arguments.threads))
        print(f"\n{table(measured[-1])}", flush=True)
    for each in measure_model(sizes, arguments):
        measured.append(each)
        print(f"\n{table(each)}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": described, "sweeps": [asdict(each) for each in measured]}
    (arguments.out / "scale.json").write_text(json.dumps(content, indent=1) + "\n")
    subtitle = (
        f"{described['processor']}, {arguments.threads} threads, load {described['load before it began']}"
    )
    draw(measured, subtitle, arguments.out / "scale.png")


if __name__ == "__main__":
    main()
