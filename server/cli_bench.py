"""`libration bench`: how fast a running server answers, as its clients see it."""

import json
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import quote

import click
from tqdm import tqdm

from server.api_client import ApiClient, Json
from server.cli_completion import endpoint_names
from server.cli_tables import JSON_OPTION, print_table

SEED = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer. Times in seconds of one clock."""

    began: float
    first_token: float
    ended: float
    tokens: int


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the server listens.")
@click.option(
    "--model", default="some", show_default=True, shell_complete=endpoint_names, help="Which endpoint."
)
@click.option("--api-key", envvar="LIBRATION_API_KEY", help="Also from LIBRATION_API_KEY.")
@click.option(
    "--streams",
    multiple=True,
    default=(1, 8),
    show_default=True,
    type=click.IntRange(1, 256),
    help="Answers at once; may be given several times.",
)
@click.option("--prompt-tokens", default=64, show_default=True, type=click.IntRange(1), help="Of a prompt.")
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(2), help="Of an answer.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Medians are shown.")
@click.option(
    "--plasticity",
    type=click.Choice(["off", "read", "learn"]),
    default="off",
    show_default=True,
    help="With learn, random tokens move your keys.",
)
@JSON_OPTION
def bench(
    url: str,
    model: str,
    api_key: str | None,
    streams: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    plasticity: str,
    *,
    as_json: bool,
) -> None:
    """Measure how fast a running server answers.

    Prompts are random tokens, each another; nothing of one can be taken from another's.
    """
    server, chance = ApiClient.of(url, api_key), random.Random(SEED)  # noqa: S311
    vocab_size: int = server.get(f"/tokenizer_info?model={quote(model)}")["vocab_size"]
    fields: Json = {"model": model, "max_tokens": new_tokens, "ignore_eos": True, "temperature": 0}
    fields |= {"plasticity": plasticity, "stream_options": {"include_usage": True}}

    def ask(_: int) -> Timing:
        prompt = [chance.randrange(vocab_size) for _ in range(prompt_tokens)]
        return _timed(server, fields | {"prompt": prompt})

    ask(0)  # what only the first answer pays for
    found: list[dict[str, object]] = []
    with tqdm(total=rounds * len(streams), desc="measuring", unit="round", leave=False) as bar:
        for count in streams:
            with ThreadPoolExecutor(count) as pool:
                measured: list[list[Timing]] = []
                for _ in range(rounds):
                    measured.append(list(pool.map(ask, range(count))))
                    bar.update()
            found.append({"model": model, "streams": count} | _summary(measured))
    if as_json:
        click.echo(json.dumps(found))
    else:
        print_table(found, tuple(found[0]), as_json=False)


def _timed(server: ApiClient, body: Json) -> Timing:
    began = time.monotonic()
    first_token, ended, tokens = None, began, 0
    for chunk in server.stream("/v1/completions", body):
        ended = time.monotonic()
        first_token = first_token or ended
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    assert first_token is not None, "a stream has chunks"
    return Timing(began, first_token, ended, tokens)


def _summary(rounds: Sequence[Sequence[Timing]]) -> dict[str, object]:
    """Medians over rounds of what one round of answers at once came to."""
    timings = [each for timings in rounds for each in timings]
    totals = [
        sum(each.tokens for each in timings)
        / (max(each.ended for each in timings) - min(each.began for each in timings))
        for timings in rounds
    ]
    return {
        "first_token_s": statistics.median(each.first_token - each.began for each in timings),
        "slowest_first_token_s": max(each.first_token - each.began for each in timings),
        "stream_tokens_per_s": statistics.median(
            (each.tokens - 1) / (each.ended - each.first_token) for each in timings
        ),
        "total_tokens_per_s": statistics.median(totals),
    }
