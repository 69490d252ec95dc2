"""How much of a chat that resends its history need not be read again, and what that saves.

    python bench/chat_reuse.py [--turns 6] [--threads 2]

The same chat with two servers, one without prefix cache: a system prompt, then turns of a question and an answer of 48
tokens. Of each prompt it tells the tokens that were taken from the cache, and of the last turn the time to the first token.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import machine
from libration_server import MODES, LibrationServer, Mode, rest_s

ANSWER_TOKENS = 48
SYSTEM = (
    "You are a patient guide to the coast of Norfolk. You know its tides, its birds, its churches and the railway lines "
    "that were taken up. Answer briefly, name places, and say so when you do not know something. "
) * 2
QUESTIONS = (
    "We arrive on Friday evening with two children and a dog, and would like to walk to the sea before it gets dark. Where?",
    "It will be high tide at seven. Does that change what you just said, and is there a beach where the dog may run?",
    "My daughter wants to see seals. When do the boats leave, how long do they take, and what does one have to bring?",
    "On Sunday it is supposed to rain until the afternoon. Is there a church with a good tower, or a small museum?",
    "Somebody told us of a railway that ran along the marshes. What is left of it, and can one walk where the line was?",
    "Now put all of that into a plan for the three days, in the order in which we should do it, with one line for each.",
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt of a chat."""

    prompt_tokens: int
    cached_tokens: int
    learned_tokens: int
    first_s: float  # until the first token


async def say(server: LibrationServer, messages: list[dict[str, str]], mode: Mode) -> tuple[str, Turn]:
    body = {"messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}} | dict(mode)
    text, first_s, chunk, started = "", 0.0, {}, time.monotonic()
    async with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line or line.endswith("[DONE]"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            piece = chunk["choices"][0]["delta"].get("content", "") if chunk["choices"] else ""
            if piece and not text:
                first_s = time.monotonic() - started
            text += piece
    usage = chunk["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return text, Turn(usage["prompt_tokens"], cached, chunk["libration"]["learned_tokens"], first_s)


async def chat(server: LibrationServer, mode: Mode, turns: int) -> list[Turn]:
    messages, told = [{"role": "system", "content": SYSTEM}], []
    for question in QUESTIONS[:turns]:
        messages.append({"role": "user", "content": question})
        text, turn = await say(server, messages, mode)
        messages.append({"role": "assistant", "content": text})
        told.append(turn)
        await asyncio.sleep(rest_s(mode))
    return told


def row(name: str, kept: Iterable[Turn], plain: Iterable[Turn]) -> str:
    turns, last, before = list(kept), list(kept)[-1], list(plain)[-1]
    prompts, cached = sum(t.prompt_tokens for t in turns), sum(t.cached_tokens for t in turns)
    share = f"{100 * cached / prompts:.0f} %"
    by_turn = " ".join(str(t.cached_tokens) for t in turns)
    learned = sum(t.learned_tokens for t in turns)
    return f"| {name} | {prompts} | {by_turn} | {share} | {learned} | {before.first_s:.2f} | {last.first_s:.2f} |"


async def measure(turns: int, threads: int) -> list[str]:
    modes = MODES | {"some, reading": {"model": "some", "plasticity": "read"}}
    with (
        tempfile.TemporaryDirectory() as kept,
        tempfile.TemporaryDirectory() as plain,
        ExitStack() as running,
    ):
        servers = [LibrationServer(Path(kept), threads)]
        running.callback(servers[0].stop)
        servers.append(LibrationServer(Path(plain), threads, ENGINE__PREFIX_CACHE_TOKENS="0"))
        running.callback(servers[1].stop)
        rows = [row(name, *[await chat(s, mode, turns) for s in servers]) for name, mode in modes.items()]
        for server in servers:
            await server.client.aclose()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=len(QUESTIONS), choices=range(1, len(QUESTIONS) + 1))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(machine.lines(machine.described(arguments.threads)), end="\n\n")
    print(
        "| mode | prompt tokens of all turns | taken from the cache, turn by turn | share | learned tokens"
        " | last turn's first token without, s | with |\n|---|---|---|---|---|---|---|"
    )
    print(*asyncio.run(measure(arguments.turns, arguments.threads)), sep="\n")


if __name__ == "__main__":
    main()
