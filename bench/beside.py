"""How long streams wait for their next token while a long prompt is read beside them.

    python bench/beside.py [--modes dense mom] [--streams 1 8] [--rounds 5] [--threads 2]

Over HTTP, as a reader sees it: some streams write, first undisturbed, then while a prompt of 1,024 tokens is read. What is
compared comes from the same streams of the same rounds; modes take turns. The prompt by itself is timed in each round, too.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import machine
import numpy as np
from libration_server import MODES, LibrationServer, Mode, rest_s, token_ids

PROMPT_TOKENS, LONG_PROMPT, MOST_TOKENS = 64, 1024, 1500
WARM_TOKENS, QUIET_TOKENS = 8, 100
MODES_MEASURED = ["dense", "some, learning off", "moe", "mom", "fm-moe"]


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds."""

    quiet: list[float]  # between two tokens of a stream, undisturbed
    disturbed: list[float]  # the same beside the prompt
    prompt: float  # until its first token, beside the streams
    prompt_alone: float


def gaps(stamps: Sequence[Sequence[float]], since: float, until: float) -> list[float]:
    """Between tokens of a stream next to each other, `stamps` when they came, that lie within a time."""
    return [
        after - before
        for stream in stamps
        for before, after in itertools.pairwise(stream)
        if since <= before and after <= until
    ]


async def write(
    server: LibrationServer, prompt: list[int], mode: Mode, stamps: list[float], enough: asyncio.Event
) -> None:
    """A stream that notes when its tokens come, until somebody has seen enough."""
    async with contextlib.aclosing(server.arrivals(prompt, MOST_TOKENS, mode)) as arrivals:
        async for at in arrivals:
            stamps.append(at)
            if enough.is_set():
                return
    raise AssertionError("the streams ended before the prompt was read")


async def measure(server: LibrationServer, mode: Mode, streams: int, seed: int) -> Round:
    alone = await server.complete(token_ids(LONG_PROMPT, seed), 1, mode)
    await asyncio.sleep(rest_s(mode))
    stamps: list[list[float]] = [[] for _ in range(streams)]
    enough = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for number, own in enumerate(stamps):
            prompt = token_ids(PROMPT_TOKENS, seed + 2 + number)
            tasks.create_task(write(server, prompt, mode, own, enough))
        while min(map(len, stamps)) < WARM_TOKENS:
            await asyncio.sleep(0.01)
        began, wanted = time.monotonic(), min(map(len, stamps)) + QUIET_TOKENS
        while min(map(len, stamps)) < wanted:
            await asyncio.sleep(0.01)
        sent = time.monotonic()
        beside = await server.complete(token_ids(LONG_PROMPT, seed + 1), 1, mode)
        done = time.monotonic()
        enough.set()
    await asyncio.sleep(rest_s(mode))
    return Round(gaps(stamps, began, sent), gaps(stamps, sent, done), beside, alone)


def row(name: str, streams: int, rounds: Sequence[Round]) -> str:
    quiet = 1000 * np.concatenate([each.quiet for each in rounds])
    disturbed = 1000 * np.concatenate([each.disturbed for each in rounds])
    (middle, most), (slow, slowest) = (np.percentile(each, (50, 99)) for each in (quiet, disturbed))
    beside, alone = (
        np.median([getattr(each, field) for each in rounds]) for field in ("prompt", "prompt_alone")
    )
    figures = (
        f"{middle:.1f} / {most:.1f} | {slow:.1f} / {slowest:.1f} | {slow / middle:.2f} | {slowest / most:.2f}"
    )
    return f"| {name} | {streams} | {figures} | {beside:.1f} ({alone:.1f}) |"


async def measure_all(arguments: argparse.Namespace) -> dict[tuple[str, int], list[Round]]:
    results: dict[tuple[str, int], list[Round]] = {}
    with tempfile.TemporaryDirectory() as folder:
        server = LibrationServer(Path(folder), arguments.threads)
        try:
            for number in range(arguments.rounds + 1):
                for mode in arguments.modes:
                    for streams in arguments.streams:
                        measured = await measure(server, MODES[mode], streams, 1000 * number + 100 * streams)
                        results.setdefault((mode, streams), []).extend([measured] if number else [])
                print(f"round {number} of {arguments.rounds}", file=sys.stderr)
            await server.client.aclose()
        finally:
            server.stop()
    return results


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--modes", nargs="+", default=MODES_MEASURED, choices=list(MODES))
    made.add_argument("--streams", nargs="+", type=int, default=[1, 8])
    made.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = made.parse_args()
    print(machine.lines(machine.described(arguments.threads)), flush=True)
    results = asyncio.run(measure_all(arguments))
    print(
        "\n| | streams | ms between tokens, median / p99 | beside a prompt | ratio of medians | of p99 | prompt, s (alone) |"
    )
    print("|---|---|---|---|---|---|---|")
    for (mode, streams), rounds in results.items():
        print(row(mode, streams, rounds))


if __name__ == "__main__":
    main()
