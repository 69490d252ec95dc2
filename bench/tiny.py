"""Does moving routing keys while reading pay? A tiny model from scratch, every rule side by side, in ten minutes.

    python bench/tiny.py [--streams c javascript] [--seeds 1 2] [--threads 2] [--out docs/figures]

Per seed: train three SOME layers on English, Python and a little C, then read text that the model has never seen, test
first, then learn, under each rule (bench/tiny_rules.py). Gain is the percentage by which the loss on the stream is
lower than with frozen keys on the same windows; forgetting, by which it is higher on held-out text of the original
mixture with the keys that the stream left behind. A session is 4,096 tokens of one file; rules named "session" begin
anew with each, so they leave nothing behind. Intervals are 95 %, files drawn with replacement. Prints a markdown table,
writes tiny.json and tiny.png. A thread reads one seed; numbers do not depend on how many there are.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tiny_text
import torch
from tiny_model import TinyConfig, train
from tiny_report import draw, summarize, table
from tiny_rules import RULES
from tiny_stream import StreamResult, stream
from tiny_text import Text
from tqdm import tqdm

from model.training.sources import DOMAINS

SESSION_TOKENS = 4096
HELDOUT_TOKENS = 12_800


@dataclass(frozen=True, slots=True)
class SeedResult:
    streams: dict[str, StreamResult]
    core_seconds: float


def run_seed(config: TinyConfig, text: Text, job: tuple[int, int]) -> SeedResult:
    """Train one model and read every stream; `job` is its row among the progress bars and its seed."""
    position, seed = job
    torch.set_num_threads(1)
    model = train(config, text.train, seed, position)
    results: dict[str, StreamResult] = {}
    for name, sessions in text.streams.items():
        total = len(RULES) * len(sessions)
        with tqdm(total=total, desc=f"seed {seed}: {name}", unit="session", position=position) as bar:
            results[name] = stream(model, RULES, sessions, text.heldout, seed, bar)
    return SeedResult(results, time.process_time())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [domain.name for domain in DOMAINS]
    parser.add_argument("--streams", nargs="+", choices=names, default=["c", "javascript"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--threads", type=int, default=2, help="seeds at work at once, a thread each")
    parser.add_argument("--sessions", type=int, default=16, help="per stream")
    parser.add_argument("--steps", type=int, default=TinyConfig().steps, help="of training")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    started = time.perf_counter()
    config = TinyConfig(steps=arguments.steps)
    text = tiny_text.load(
        config.context,
        config.vocabulary,
        config.steps * config.sequences_per_step * config.context,
        HELDOUT_TOKENS,
        arguments.streams,
        arguments.sessions,
        SESSION_TOKENS,
    )
    context = multiprocessing.get_context("spawn")
    tqdm.set_lock(context.RLock())
    with ProcessPoolExecutor(
        arguments.threads, context, initializer=tqdm.set_lock, initargs=(tqdm.get_lock(),)
    ) as pool:
        by_seed = list(pool.map(partial(run_seed, config, text), enumerate(arguments.seeds)))
    results = {
        name: summarize(
            [rule.name for rule in RULES],
            np.stack([each.streams[name].losses for each in by_seed]),
            np.stack([each.streams[name].heldout for each in by_seed]),
            text.heldout_files.numpy(),
            np.stack([each.streams[name].effective_rank for each in by_seed]),
        )
        for name in arguments.streams
    }
    described = {
        "model": asdict(config),
        "seeds": arguments.seeds,
        "session_tokens": SESSION_TOKENS,
        "seconds": round(time.perf_counter() - started),
        "core_seconds": [
            round(each.core_seconds) for each in by_seed
        ],  # on a busy machine the smaller number
        "heldout_loss": float(
            np.mean([each.streams[arguments.streams[0]].heldout[0].mean() for each in by_seed])
        ),
        "files": text.sources,
        "streams": {name: [asdict(each) for each in rows] for name, rows in results.items()},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tiny.json").write_text(json.dumps(described, indent=1) + "\n")
    title = f"A tiny model from scratch, {len(arguments.seeds)} seeds: keys that learn while reading"
    draw(results, title, arguments.out / "tiny.png")
    print(table(results))


if __name__ == "__main__":
    main()
