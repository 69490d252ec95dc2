"""Text out of tokens: stop strings and characters, however the engine's hand-overs were merged."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.logprobs import TokenScore
from server.answer_text import StopStrings
from server.engine.errors import GenerationFailed
from server.engine.mailbox import Mailbox
from server.engine.sequence import Report, TokenEvent
from server.generation import Generation, KeyUse

PLAIN = Report()


class Runner:
    def __init__(self):
        self.ended = []

    def end(self, sequence, reason):
        self.ended.append(reason)


class Prompt:
    def __init__(self, tokenizer):
        self.prompt_token_ids = tuple(tokenizer.encode("b🌍"))


def read(tokenizer, events, stop=(), report=PLAIN):
    """Text, tokens, reason and what the runner was told of an answer that came in these events."""

    async def run():
        runner, mailbox = Runner(), Mailbox(asyncio.get_running_loop())
        generation = Generation(
            runner, Prompt(tokenizer), mailbox, tokenizer, stop, KeyUse(None, None, "off", 0), report
        )
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


def scored(prompt_scores, tokens, sizes):
    """The prompt's scores and the tokens' as events of these sizes."""
    prompt = [TokenEvent((), prompt_scores=tuple(each)) for each in batches(prompt_scores, sizes)]
    events = cut(tokens, sizes)
    at = 0
    for i, event in enumerate(events):
        own = tuple(TokenScore(t, -float(n)) for n, t in enumerate(event.token_ids, at))
        events[i] = replace(event, scores=own)
        at += len(own)
    return [*prompt, *events]


def batches(items, sizes):
    items = list(items)
    while items:
        size = sizes[0] if sizes else len(items)
        yield items[:size]
        items, sizes = items[size:], sizes[1:]


def collect(tokenizer, events, stop, report):
    """Text and scored tokens of an answer, from its deltas."""

    async def run():
        mailbox = Mailbox(asyncio.get_running_loop())
        generation = Generation(
            Runner(), Prompt(tokenizer), mailbox, tokenizer, stop, KeyUse(None, None, "off", 0), report
        )
        text, tokens, seen = "", [], 0

        async def feed():
            for event in events:
                mailbox.put(event)
                await asyncio.sleep(0)

        feeding = asyncio.ensure_future(feed())
        async for delta in generation.deltas():
            text += delta.text
            tokens += delta.scored
            seen += len(delta.token_ids)
            assert all(each.offset <= len(text) for each in tokens)
        await feeding
        return text, tokens, seen

    return asyncio.run(run())


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet="ab🌍é", min_size=1, max_size=12),
    sizes=st.lists(st.integers(1, 4), max_size=12),
    stop=st.lists(st.text(alphabet="ab🌍é", min_size=1, max_size=3), max_size=2),
    echo=st.booleans(),
)
def test_scores_belong_to_the_text_however_events_were_merged(tokenizer, text, sizes, stop, echo):
    tokens = tokenizer.encode(text)
    report = Report(top_logprobs=0, echo=echo)
    prompt = [TokenScore(t, -1.0) for t in Prompt(tokenizer).prompt_token_ids[1:]] if echo else []
    whole = collect(tokenizer, scored(prompt, tokens, []), tuple(stop), report)
    assert collect(tokenizer, scored(prompt, tokens, sizes), tuple(stop), report) == whole
    written, marks, _ = whole
    data = b"".join(tokenizer.token_bytes(each.score.token_id) for each in marks).decode(errors="replace")
    if not any(s in text for s in stop):
        assert data == written
        assert [each.score.token_id for each in marks][-len(tokens) :] == tokens
    else:  # the last token may begin before the cut and end behind it
        assert data.startswith(written)
    for mark in marks:
        before = b"".join(
            tokenizer.token_bytes(each.score.token_id) for each in marks[: marks.index(mark)]
        ).decode(errors="ignore")
        assert mark.offset == len(before)


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
