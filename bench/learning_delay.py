"""Does learning hold up the tokens of others?

    python bench/learning_delay.py [--rule direct] [--rounds 3] [--threads 2]

One client writes a long answer while another sends prompts of 512 tokens without a pause, each answered with one
token. In turn those prompts teach, or only read; the gap between two tokens of the long answer is
what the engine's step takes, prompt and all. What credit computed in the background adds to the longest gaps is what is
measured. Medians over rounds of each round's percentiles, milliseconds.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

from libration_server import LibrationServer, token_ids

ANSWER, PROMPT = 48, 512
MODES = {"reading": "read", "learning": "learn"}
PERCENTILES = (50, 99, 100)


async def gaps_ms(server: LibrationServer, plasticity: str, seed: int) -> tuple[list[float], int]:
    """Gaps between the tokens of one answer, and how many prompts the other client got through meanwhile."""
    done = asyncio.Event()
    prompts = 0

    async def teach() -> None:
        nonlocal prompts
        while not done.is_set():
            prompt = token_ids(PROMPT, seed * 1000 + prompts)
            await server.complete(prompt, 1, {"model": "some", "plasticity": plasticity})
            prompts += 1

    teaching = asyncio.create_task(teach())
    body = {"model": "some", "plasticity": "off", "prompt": token_ids(32, seed), "max_tokens": ANSWER}
    body |= {"temperature": 0, "ignore_eos": True, "stream": True}
    arrived: list[float] = []
    async with server.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            arrived += [time.monotonic()] if line.startswith("data: {") else []
    done.set()
    await teaching
    return [1000 * (b - a) for a, b in itertools.pairwise(arrived)], prompts


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


async def measure(server: LibrationServer, rounds: int) -> None:
    readings: dict[str, list[tuple[list[float], int]]] = {name: [] for name in MODES}
    await gaps_ms(server, "read", 0)  # warm-up
    for seed in range(1, rounds + 1):
        for name, plasticity in MODES.items():
            readings[name].append(await gaps_ms(server, plasticity, seed))
    print(f"| other prompts | {' | '.join(f'p{p}' for p in PERCENTILES)} | prompts an answer |")
    print("|" + "---|" * (len(PERCENTILES) + 2))
    for name, each in readings.items():
        cells = [f"{statistics.median(percentile(gaps, p) for gaps, _ in each):.0f}" for p in PERCENTILES]
        prompts = statistics.median(count for _, count in each)
        print(f"| {name} | {' | '.join(cells)} | {prompts:.0f} |")
    metrics = (await server.client.get("/metrics")).text
    learned = [line for line in metrics.splitlines() if line.startswith("libration_key_updates_total")]
    print("\n".join(learned))


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rule", choices=("direct", "gradient"), default="direct")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=2)
    arguments = made.parse_args()
    os.environ["LIBRATION_ENDPOINTS__SOME__VARIANT"] = "some"
    os.environ["LIBRATION_ENDPOINTS__SOME__GRAVITY__RULE"] = arguments.rule
    with tempfile.TemporaryDirectory() as folder:
        server = LibrationServer(Path(folder), arguments.threads)
        try:
            asyncio.run(measure(server, arguments.rounds))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
