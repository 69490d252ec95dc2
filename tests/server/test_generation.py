"""Text out of tokens: stop strings and characters, however the engine's hand-overs were merged."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.errors import GenerationFailed
from server.engine.mailbox import Mailbox
from server.engine.sequence import TokenEvent
from server.generation import Generation, KeyUse, StopStrings


class Runner:
    def __init__(self):
        self.ended = []

    def end(self, sequence, reason):
        self.ended.append(reason)


class Prompt:
    prompt_token_ids = (1, 2)


def read(tokenizer, events, stop=()):
    """Text, tokens, reason and what the runner was told of an answer that came in these events."""

    async def run():
        runner, mailbox = Runner(), Mailbox(asyncio.get_running_loop())
        generation = Generation(runner, Prompt(), mailbox, tokenizer, stop, KeyUse(None, None, "off", 0))
        text, tokens, reason = "", 0, None
        deltas = generation.deltas()
        for event in events:
            mailbox.put(event)
            await asyncio.sleep(0)
            if reason is None:
                delta = await anext(deltas)
                text, tokens, reason = text + delta.text, tokens + len(delta.token_ids), delta.finish_reason
        await deltas.aclose()
        return text, tokens, reason, runner.ended

    return asyncio.run(run())


def cut(tokens, sizes):
    """Tokens as events of these sizes, the last one with the rest."""
    events, at = [], 0
    for size in sizes:
        if at + size < len(tokens):
            events.append(TokenEvent(tuple(tokens[at : at + size])))
            at += size
    return [*events, TokenEvent(tuple(tokens[at:]), "length")]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet="ab🌍é", min_size=1, max_size=12),
    sizes=st.lists(st.integers(1, 4), max_size=12),
    stop=st.lists(st.text(alphabet="ab🌍é", min_size=1, max_size=3), max_size=3),
)
def test_merging_never_shows_in_the_answer(tokenizer, text, sizes, stop):
    tokens = tokenizer.encode(text)
    at_once = read(tokenizer, cut(tokens, []), tuple(stop))
    assert read(tokenizer, cut(tokens, sizes), tuple(stop))[:3] == at_once[:3]
    hits = [text.index(s) for s in stop if s in text]
    if hits:
        assert at_once[2] == "stop"
        assert text.startswith(at_once[0])
        assert not any(s in at_once[0] for s in stop)
    else:
        assert at_once[:3] == (text, len(tokens), "length")


def test_a_stop_string_ends_the_sequence_as_a_stop(tokenizer):
    text, tokens, reason, ended = read(tokenizer, [TokenEvent(tuple(tokenizer.encode("one.two")))], (".",))
    assert (text, tokens, reason, ended) == ("one", 4, "stop", ["stop"])


def test_leaving_early_cancels(tokenizer):
    text, _, reason, ended = read(tokenizer, [TokenEvent(tuple(tokenizer.encode("one")))])
    assert (text, reason, ended) == ("one", None, ["cancelled"])


@pytest.mark.parametrize("reason", ["error", "cancelled"])
def test_an_engine_that_gives_up_is_an_error(tokenizer, reason):
    with pytest.raises(GenerationFailed):
        read(tokenizer, [TokenEvent((), reason)])


def test_stop_strings_hold_back_only_what_may_still_match():
    stop = StopStrings(("abc",))
    assert [stop.push(c) for c in "xaby"] == [("x", False), ("", False), ("", False), ("aby", False)]
    assert stop.push("ab") == ("", False)
    assert stop.rest() == "ab"
