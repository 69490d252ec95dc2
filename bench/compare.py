"""Libration, transformers and llama.cpp on the same GGUF file, interleaved in one run, with equal threads.

    python bench/compare.py [--rounds 5] [--starts 3] [--threads 2] [--modes dense "some, learning"] [--peers transformers llama.cpp]

Every round measures everybody once, in an order of its own, drawn by lot (whoever always comes behind the same other one is
measured with what that one left in the caches): the first token of a 512-token prompt, 64 new tokens behind 64 at one
stream, and the same at eight. All get the same prompts (token ids of Python's own library), write
greedily, ignore the end token, and are timed as a whole: prompt and answer. Libration is measured over HTTP, the peers in
processes of their own that get token ids through a pipe. Medians over rounds, and medians of the ratios within a round.

Starts come first: one in an empty data folder, which converts the model, then a few as they always are. llama.cpp runs with
one thread, with half of them and with all, since more are often slower. It is installed by npm into a temporary folder. A peer
that cannot be had is said to be missing.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import llama_peer
import machine
import transformers_peer
from compare_report import Comparison, Cost, Figures, report
from libration_server import MODES, REST_S, LibrationServer, rest_s, token_ids
from peer_process import Missing, PeerProcess

from model.checkpoints.load import find_base_file

PROMPT_TOKENS, NEW_TOKENS, LONG_PROMPT, STREAMS = 64, 64, 512, 8


@dataclass(frozen=True, slots=True)
class Side:
    """Who is measured: generates so many tokens behind each of some prompts, and tells the seconds."""

    name: str
    generate: Callable[[list[list[int]], int], Awaitable[float]]
    rest_s: float = REST_S  # behind every answer


async def measure(side: Side, seed: int) -> Figures:
    """Another seed is another set of prompts, none of which begins as another does."""

    async def seconds(prompts: list[list[int]], tokens: int) -> float:
        spent = await side.generate(prompts, tokens)
        await asyncio.sleep(side.rest_s)
        return spent

    first = await seconds([token_ids(LONG_PROMPT, seed)], 1)
    one = await seconds([token_ids(PROMPT_TOKENS, seed + 1)], NEW_TOKENS)
    eight = await seconds([token_ids(PROMPT_TOKENS, seed + 2 + i) for i in range(STREAMS)], NEW_TOKENS)
    return {"one": NEW_TOKENS / one, "eight": STREAMS * NEW_TOKENS / eight, "first": first}


async def take_turns(sides: Sequence[Side], rounds: int) -> dict[str, list[Figures]]:
    """Figures by side and round; an unmeasured round warms everybody up."""
    results: dict[str, list[Figures]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in random.Random(number).sample(sides, len(sides)):
            measured = await measure(side, 1000 * number)
            results[side.name] += [measured] if number else []
        print(f"round {number} of {rounds}", file=sys.stderr)
    return results


def start_libration(folder: Path, threads: int, starts: int) -> tuple[LibrationServer, float, list[float]]:
    """A server, the seconds of the start that converted the model, and those of the starts behind it."""
    server = LibrationServer(folder, threads)
    converting, usual = server.ready_s, list[float]()
    for _ in range(starts):
        server.stop()
        server = LibrationServer(folder, threads)
        usual.append(server.ready_s)
    return server, converting, usual


def start_transformers(folder: Path, threads: int) -> Iterator[PeerProcess]:
    yield transformers_peer.start(find_base_file(), threads)


def start_llama(folder: Path, threads: int) -> Iterator[PeerProcess]:
    llama_peer.install(folder)
    for count in sorted({1, max(1, threads // 2), threads}):
        yield llama_peer.start(folder, find_base_file(), count, STREAMS)


PEERS: dict[str, Callable[[Path, int], Iterator[PeerProcess]]] = {
    "transformers": start_transformers,
    "llama.cpp": start_llama,
}


async def compare(arguments: argparse.Namespace) -> Comparison:
    described = machine.described(arguments.threads)
    print(machine.lines(described), file=sys.stderr)
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        data, npm = Path(folder) / "data", Path(folder) / "npm"
        data.mkdir()
        server, converting_s, starts_s = start_libration(data, arguments.threads, arguments.starts)
        running.callback(server.stop)
        print(f"Libration is ready after {statistics.median(starts_s):.1f} s", file=sys.stderr)
        sides = [
            Side(name, partial(server.generate, mode=MODES[name]), rest_s(MODES[name]))
            for name in arguments.modes
        ]
        peers: dict[str, list[PeerProcess]] = {name: [] for name in arguments.peers}
        for name, started in peers.items():
            try:
                for peer in PEERS[name](npm, arguments.threads):
                    running.callback(peer.stop)
                    started.append(peer)
                    sides.append(Side(peer.name, peer.generate))
                    print(f"{peer.name} is ready after {peer.ready_s:.1f} s", file=sys.stderr)
            except Missing as error:
                missing.append(str(error))
        results = await take_turns(sides, arguments.rounds)
        await server.client.aclose()
        costs = {"Libration, all endpoints": Cost(statistics.median(starts_s), server.peak_mb())}
        costs |= {
            peer.name: Cost(peer.ready_s, peer.peak_mb()) for started in peers.values() for peer in started
        }
    return Comparison(
        machine=described,
        results=results,
        peers={name: [peer.name for peer in started] for name, started in peers.items()},
        costs=costs,
        converting_s=converting_s,
        missing=missing,
    )


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument(
        "--starts",
        type=int,
        default=3,
        choices=range(1, 10),
        help="of Libration, after the one that converts",
    )
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    made.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    made.add_argument("--json", type=Path, help="write every round's figures there, too")
    arguments = made.parse_args()
    comparison = asyncio.run(compare(arguments))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(comparison.as_dict(), indent=1) + "\n")
    print(report(comparison))


if __name__ == "__main__":
    main()
