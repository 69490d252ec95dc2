"""Libration, transformers and llama.cpp on the same GGUF file, interleaved in one run, with equal threads.

    python bench/compare.py [--rounds 5] [--threads 2] [--modes dense "some, learning"]

Every round measures everybody once: the first token of a 512-token prompt, 64 new tokens behind 64 at one stream, and
the same at eight. Libration is measured over HTTP, the peers in their own processes. Medians over the rounds, and
ratios to each peer. llama.cpp runs with one thread and with all, since two are often slower than one; it is installed
by npm into a temporary folder. A peer that cannot be had is said to be missing.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from llama_peer import LlamaCpp, Missing, install
from serve import (
    LONG_PROMPT,
    MODES,
    NEW_TOKENS,
    PROMPT_TOKENS,
    LibrationServer,
    Transformers,
    measure_libration,
    token_ids,
)

from model.checkpoints.load import find_base_file

STREAMS = 8
COLUMNS = {
    "one": "1 stream, tok/s",
    "eight": "8 streams, tok/s",
    "first": "first token of a 512-token prompt, s",
}
Measure = Callable[[int], Awaitable[dict[str, float]]]


def measure_llama(peer: LlamaCpp, seed: int) -> dict[str, float]:
    first = peer.generate([token_ids(LONG_PROMPT, seed)], 1)["first"]
    one = peer.generate([token_ids(PROMPT_TOKENS, seed + 1)], NEW_TOKENS)["seconds"]
    prompts = [token_ids(PROMPT_TOKENS, seed + 2 + i) for i in range(STREAMS)]
    eight = peer.generate(prompts, NEW_TOKENS)["seconds"]
    return {"one": NEW_TOKENS / one, "eight": STREAMS * NEW_TOKENS / eight, "first": first}


def add_transformers(measures: dict[str, Measure], threads: int) -> None:
    """Raises Missing."""
    try:
        peer = Transformers(threads)
    except ImportError as error:
        raise Missing(str(error)) from error

    async def measure(seed: int) -> dict[str, float]:
        return peer.measure(seed)

    measures[peer.name] = measure


def add_llama(measures: dict[str, Measure], folder: Path, threads: int) -> list[LlamaCpp]:
    """Raises Missing."""
    name, started = install(folder), []
    for count in sorted({1, threads}):
        peer = LlamaCpp(folder, find_base_file(), count, STREAMS)
        started.append(peer)

        async def measure(seed: int, peer: LlamaCpp = peer) -> dict[str, float]:
            return measure_llama(peer, seed)

        measures[f"{name}, {count} thread{'s' * (count > 1)}"] = measure
    return started


def add_libration(measures: dict[str, Measure], server: LibrationServer, modes: list[str]) -> None:
    for name in modes:

        async def measure(seed: int, mode: dict[str, str] = MODES[name]) -> dict[str, float]:
            return await measure_libration(server, mode, seed)

        measures[name] = measure


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    arguments = parser.parse_args()
    measures: dict[str, Measure] = {}
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        server, started = LibrationServer(Path(folder), arguments.threads), []
        try:
            add_libration(measures, server, arguments.modes)
            peers_from = len(measures)
            for add in (
                lambda: add_transformers(measures, arguments.threads),
                lambda: started.extend(add_llama(measures, Path(folder) / "npm", arguments.threads)),
            ):
                try:
                    add()
                except Missing as error:
                    missing.append(str(error))
            results: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
            for number in range(arguments.rounds + 1):  # the first warms up
                for name, measure in measures.items():
                    measured = await measure(1000 * number)
                    results[name] += [measured] if number else []
                print(f"round {number} of {arguments.rounds}", file=sys.stderr)
            resident = server.resident_mib()
            await server.client.aclose()
        finally:
            server.stop()
            for peer in started:
                peer.stop()
    medians = {
        name: {key: statistics.median(r[key] for r in rounds) for key in COLUMNS}
        for name, rounds in results.items()
    }
    if arguments.json:
        print(json.dumps({"medians": medians, "missing": missing, "resident_mib": resident}))
    else:
        report(medians, list(medians)[peers_from:], missing, resident, arguments.threads)


def report(
    medians: dict[str, dict[str, float]],
    peers: list[str],
    missing: list[str],
    resident_mib: float,
    threads: int,
) -> None:
    """Speeds as a table, then each of Libration's as ratios to each peer: above 1 is faster."""
    print(f"| {threads} threads | {' | '.join(COLUMNS.values())} |\n|---|---|---|---|")
    for name, mine in medians.items():
        print(f"| {name} | {mine['one']:.1f} | {mine['eight']:.0f} | {mine['first']:.3f} |")
    for peer in peers:
        theirs = medians[peer]
        print(f"\n| faster than {peer} by | 1 stream | 8 streams | first token |\n|---|---|---|---|")
        for name, mine in medians.items():
            if name not in peers:
                ratios = (
                    mine["one"] / theirs["one"],
                    mine["eight"] / theirs["eight"],
                    theirs["first"] / mine["first"],
                )
                print(f"| {name} | {' | '.join(f'{ratio:.2f}x' for ratio in ratios)} |")
    print(f"\nresident memory of the server after the run: {resident_mib:.0f} MiB")
    for reason in missing:
        print(f"missing: {reason}")


if __name__ == "__main__":
    asyncio.run(main())
