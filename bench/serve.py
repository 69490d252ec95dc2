"""Serving speed over HTTP beside transformers' `generate` on the same weights, interleaved in one run.

    python bench/serve.py [--rounds 3] [--threads 2]

Starts its own server on a free loopback port with a data folder of its own. Both sides get the same prompts (token
ids), generate greedily, ignore the end token, and are timed as a whole: prompt and answer. Medians over rounds.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

PROMPT_TOKENS, NEW_TOKENS, LONG_PROMPT = 64, 64, 512
SETTLE_S = 1.0  # between measurements: what a prompt taught is worked off after its answer
START_TIMEOUT_S = 300
MODES = {
    "some, learning": {"model": "some", "plasticity": "learn"},
    "some, learning off": {"model": "some", "plasticity": "off"},
    "moe": {"model": "moe"},
    "mom": {"model": "mom"},
    "fm-moe": {"model": "fm-moe"},
    "dense": {"model": "dense"},
}


def token_ids(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(100, 40_000) for _ in range(count)]


class LibrationServer:
    """A server process of our own."""

    def __init__(self, folder: Path, threads: int):
        environment = os.environ | {
            "LIBRATION_DATA_DIR": str(folder),
            "LIBRATION_ENGINE__THREADS": str(threads),
        }
        self._log = (folder / "server.log").open("wb")
        command = [sys.executable, "-m", "server.cli", "serve", "--port", "0"]
        self.process = subprocess.Popen(command, env=environment, stderr=self._log)
        try:
            self.client = httpx.AsyncClient(base_url=self._started(folder / "server.log"), timeout=300)
        except BaseException:
            self.process.kill()
            raise

    def _started(self, log: Path) -> str:
        """The server's address, once it listens: the first start converts the model and compiles."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while (url := self._url(log)) is None:
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        return url

    @staticmethod
    def _url(log: Path) -> str | None:
        found = [word for word in log.read_text().split() if word.startswith("http://")]
        return found[0].removesuffix("/v1") if found else None

    async def complete(self, prompt: list[int], tokens: int, mode: dict[str, str]) -> float:
        """Seconds until the first token; returns when the whole answer is there."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        started, first = time.monotonic(), 0.0
        async with self.client.stream("POST", "/v1/completions", json=body | mode) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                assert not line.startswith('data: {"error"'), line
                first = first or time.monotonic() - started
        return first

    def resident_mib(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=40)


async def measure_libration(server: LibrationServer, mode: dict[str, str], seed: int) -> dict[str, float]:
    await asyncio.sleep(SETTLE_S)
    first = await server.complete(token_ids(LONG_PROMPT, seed), 1, mode)
    await asyncio.sleep(SETTLE_S)
    started = time.monotonic()
    await server.complete(token_ids(PROMPT_TOKENS, seed + 1), NEW_TOKENS, mode)
    one = NEW_TOKENS / (time.monotonic() - started)
    await asyncio.sleep(SETTLE_S)
    started = time.monotonic()
    prompts = [token_ids(PROMPT_TOKENS, seed + 2 + i) for i in range(8)]
    await asyncio.gather(*(server.complete(prompt, NEW_TOKENS, mode) for prompt in prompts))
    return {"one": one, "eight": 8 * NEW_TOKENS / (time.monotonic() - started), "first": first}


class Transformers:
    """`generate` in this process, bfloat16, from the same file."""

    def __init__(self, threads: int):
        import torch
        import transformers

        from model.checkpoints.load import find_base_file

        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        path = find_base_file()
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        self._model = self._model.to(torch.bfloat16).eval()
        self.name = f"transformers {transformers.__version__} generate, bf16"

    def _generate(self, prompts: list[list[int]], tokens: int) -> float:
        ids = self._torch.tensor(prompts)
        started = time.monotonic()
        self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=2,
        )
        return time.monotonic() - started

    def measure(self, seed: int) -> dict[str, float]:
        first = self._generate([token_ids(LONG_PROMPT, seed)], 1)
        one = NEW_TOKENS / self._generate([token_ids(PROMPT_TOKENS, seed + 1)], NEW_TOKENS)
        prompts = [token_ids(PROMPT_TOKENS, seed + 2 + i) for i in range(8)]
        return {"one": one, "eight": 8 * NEW_TOKENS / self._generate(prompts, NEW_TOKENS), "first": first}


def rotated(number: int) -> list[tuple[str, dict[str, str]]]:
    """The modes, beginning with another one each round: whoever comes first comes after the other side."""
    first = number % len(MODES)
    return [*list(MODES.items())[first:], *list(MODES.items())[:first]]


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    arguments = parser.parse_args()
    peer = Transformers(arguments.threads)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in (*MODES, peer.name)}
    with tempfile.TemporaryDirectory() as folder:
        server = LibrationServer(Path(folder), arguments.threads)
        try:
            for name, mode in MODES.items():
                await measure_libration(server, mode, 0)
                print(f"warmed up: {name}", file=sys.stderr)
            peer.measure(0)
            for number in range(1, arguments.rounds + 1):
                for name, mode in rotated(number):
                    results[name].append(await measure_libration(server, mode, 1000 * number))
                results[peer.name].append(peer.measure(1000 * number))
                print(f"round {number} of {arguments.rounds}", file=sys.stderr)
            resident = server.resident_mib()
            await server.client.aclose()
        finally:
            server.stop()
    report(results, peer.name, resident, arguments.json)


def report(results: dict[str, list[dict[str, float]]], peer: str, resident_mib: float, as_json: bool) -> None:
    medians = {
        name: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        for name, rounds in results.items()
    }
    if as_json:
        print(json.dumps({"medians": medians, "resident_mib": resident_mib}))
        return
    theirs = medians[peer]
    print(
        "| | 1 stream, tok/s | 8 streams, tok/s | first token of a 512-token prompt, s |\n|---|---|---|---|"
    )
    for name, mine in medians.items():
        print(
            f"| {name} | {mine['one']:.1f} ({mine['one'] / theirs['one']:.2f}x) "
            f"| {mine['eight']:.0f} ({mine['eight'] / theirs['eight']:.2f}x) "
            f"| {mine['first']:.2f} ({mine['first'] / theirs['first']:.2f}x) |"
        )
    print(f"\nratios to {peer}; resident memory of the server after the run: {resident_mib:.0f} MiB")


if __name__ == "__main__":
    asyncio.run(main())
