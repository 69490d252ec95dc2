"""Prompts that are read beside sequences that write: in parts, between which every writer gets its token."""

import itertools
import time
from dataclasses import replace

import pytest
import torch

from model.checkpoints.assemble import assemble
from model.checkpoints.names import PACKED
from model.native.packed import pack
from model.native.tiles import GROUP
from model.sampling import SamplingParams
from server.engine.counters import Observers
from server.engine.engine import Engine
from server.engine.scheduler import SchedulerConfig
from server.engine.sequence import Sequence

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def model(make_tiny, random_weights):
    """A tiny model of packed matrices, which compiled code reads."""
    config = replace(
        make_tiny(torch.float32).model.config,
        head_dim=64,
        vocab_size=96,
        max_position_embeddings=512,
        **SIZES,
    )
    weights = {name: weight.bfloat16() for name, weight in random_weights(config, torch.float32).items()}
    for name, weight in list(weights.items()):
        if weight.dim() == 2:
            bits = 8 if name == "embedding" else 4
            outputs, inputs = weight.shape
            quants = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
            scale = torch.full((outputs, inputs // GROUP), 0.2 / (1 << bits)).half()
            scales = torch.stack((scale, -scale * (1 << (bits - 1))), -1)
            weights[f"{name}{PACKED}"] = pack(quants, scales, bits)
    made = assemble(config, weights)
    if made.reader is None:
        pytest.skip("this processor has no AVX-512 BF16")
    return made


@pytest.fixture
def engine(model):
    """Its clock tells that every token and every part of a prompt takes as long as any other."""
    nobody = Observers(*[lambda endpoint, seconds: None] * 4)
    ticks = itertools.count()
    return Engine(
        model, {}, SchedulerConfig(), 4096, {"dense": frozenset()}, lambda: float(next(ticks)), nobody
    )


def request(engine, prompt, max_tokens):
    events = []
    sequence = Sequence(
        sequence_id="s",
        prompt_token_ids=tuple((5 * i + prompt) % 96 for i in range(prompt)),
        params=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        endpoint="dense",
        variant=None,
        keys=None,
        teach=None,
        deliver=events.append,
        eos_token_id=2,
        arrived_at=time.monotonic(),
    )
    engine.scheduler.waiting.append(sequence)
    return sequence, events


def written(events):
    return [token for event in events for token in event.token_ids]


def run(engine):
    while not engine.idle:
        engine.step()


def alone(engine, prompt, max_tokens):
    _, events = request(engine, prompt, max_tokens)
    run(engine)
    return written(events)


def begin(engine, prompt, max_tokens):
    """A request that has written more than its first token."""
    _, events = request(engine, prompt, max_tokens)
    engine.step()
    engine.step()
    return events


def test_who_writes_gets_tokens_while_a_long_prompt_is_read_and_both_write_what_they_write_alone(engine):
    expected = alone(engine, 10, 40), alone(engine, 300, 5)
    writer = begin(engine, 10, 40)
    long, reader = request(engine, 300, 5)
    before = len(written(writer))
    while long.prefilled == 0:
        engine.step()
    assert len(written(writer)) - before > 3
    run(engine)
    assert (written(writer), written(reader)) == expected
    assert engine.cache.reserved_tokens == 0


def test_prompts_that_come_while_the_first_is_read_are_read_before_its_third_token(engine):
    lengths = (30, 20, 25, 15)
    expected = [alone(engine, prompt, 6) for prompt in lengths]
    _, first = request(engine, lengths[0], 6)
    engine.step()
    others = [request(engine, prompt, 6)[1] for prompt in lengths[1:]]
    engine.step()
    assert [len(written(events)) for events in (first, *others)] == [2, 1, 1, 1]
    late = request(engine, 70, 6)[1]
    engine.step()
    assert not written(late), "who has waited once waits no more"
    run(engine)
    assert [written(events) for events in (first, *others)] == expected


def test_who_has_just_begun_to_write_does_not_wait_for_more_tokens_than_one_step_takes(engine):
    engine.scheduler.config = SchedulerConfig(prefill_chunk=64, step_tokens=64)
    _, first = request(engine, 10, 20)
    engine.step()
    long, _ = request(engine, 60, 5)
    engine.step()
    assert long.prefilled == 0
    assert len(written(first)) == 2
    run(engine)


@pytest.mark.parametrize(("readers", "at_once"), [(1, 1), (2, 1), (4, 4)])
def test_where_more_wait_for_their_first_token_than_write_more_is_read_beside_a_token(
    engine, monkeypatch, readers, at_once
):
    reading, parts = engine.model.reading, []

    def counted(segments, *, pauses):
        for part in reading(segments, pauses=pauses):
            parts.append(part)
            yield part

    begin(engine, 10, 40)
    monkeypatch.setattr(engine.model, "reading", counted)
    for _ in range(readers):
        request(engine, 100, 5)
    before = 0
    for _ in range(5):
        engine.step()
        assert len(parts) - before == at_once
        before = len(parts)


def test_a_prompt_that_nobody_waits_for_any_more_is_given_up_between_two_parts(engine):
    expected = alone(engine, 10, 40)
    writer = begin(engine, 10, 40)
    long, reader = request(engine, 300, 5)
    engine.step()
    assert long.prefilled == 0
    long.ended = "cancelled"
    run(engine)
    assert [event.finish_reason for event in reader] == ["cancelled"]
    assert long.prefilled == 0
    assert written(writer) == expected
    assert engine.cache.reserved_tokens == 0


def test_of_two_prompts_that_are_read_together_one_may_leave(engine):
    expected = alone(engine, 150, 5)
    begin(engine, 10, 60)
    (leaving, _), (_, staying) = request(engine, 140, 5), request(engine, 150, 5)
    engine.step()
    leaving.ended = "cancelled"
    run(engine)
    assert written(staying) == expected
    assert engine.cache.reserved_tokens == 0


def test_a_step_that_fails_within_a_prompt_leaves_nothing_of_it(engine, monkeypatch):
    expected = alone(engine, 300, 5)
    begin(engine, 10, 40)
    request(engine, 300, 5)
    engine.step()
    monkeypatch.setattr(engine.model, "step", lambda segments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.fail_running()
    monkeypatch.undo()
    assert alone(engine, 300, 5) == expected
