"""Admission and batching, without any model."""

import time

import pytest

from model.sampling import SamplingParams
from server.engine.scheduler import Scheduler, SchedulerConfig
from server.engine.sequence import Sequence


def sequence(prompt=10, max_tokens=5, variant=None):
    return Sequence(
        sequence_id="s",
        prompt_token_ids=tuple(range(prompt)),
        params=SamplingParams(max_tokens=max_tokens),
        endpoint="e",
        variant=variant,
        keys=None,
        teach=None,
        deliver=lambda event: None,
        eos_token_id=2,
        arrived_at=time.monotonic(),
    )


@pytest.fixture
def scheduler():
    return Scheduler(SchedulerConfig(max_running=3, prefill_chunk=8, step_tokens=16), lambda tokens: True)


def admit(scheduler, *sequences):
    scheduler.waiting.extend(sequences)
    while scheduler.admit():
        pass


def test_a_prompt_is_cut_at_multiples_of_the_chunk_whatever_runs_beside_it(scheduler):
    long = sequence(prompt=20)
    admit(scheduler, sequence(prompt=3), long)
    counts = []
    while not long.decoding:
        for each, count in scheduler.plan():
            if each is long:
                counts.append((each.prefilled, count))
            if not each.decoding:
                each.prefilled += count
    assert counts == [(0, 8), (8, 8), (16, 4)]


def test_a_prompt_whose_blocks_take_few_rows_at_once_is_cut_shorter_but_never_longer(scheduler):
    short, long = sequence(prompt=20), sequence(prompt=20)
    short.rows_at_once, long.rows_at_once = 3, 100
    admit(scheduler, short, long)
    assert [count for _, count in scheduler.plan()] == [3, 8]


def test_decoding_sequences_are_in_every_batch(scheduler):
    writing, reading = sequence(), sequence(prompt=100)
    writing.prefilled = 10
    admit(scheduler, writing, reading)
    assert [(s, n) for s, n in scheduler.plan() if s is writing] == [(writing, 1)]


def test_prompts_share_a_step_up_to_its_tokens(scheduler):
    admit(scheduler, sequence(prompt=50), sequence(prompt=50), sequence(prompt=50))
    assert sum(count for _, count in scheduler.plan()) == 16


def test_nobody_overtakes_a_sequence_that_waits_for_memory():
    scheduler = Scheduler(SchedulerConfig(max_running=3), lambda tokens: tokens < 50)
    large, small = sequence(prompt=100), sequence(prompt=5)
    admit(scheduler, large, small)
    assert scheduler.running == []
    assert list(scheduler.waiting) == [large, small]


def test_no_more_run_than_allowed(scheduler):
    admit(scheduler, *(sequence() for _ in range(5)))
    assert (len(scheduler.running), len(scheduler.waiting)) == (3, 2)


def test_sequences_of_one_variant_are_neighbours(scheduler):
    admit(scheduler, sequence(5, variant="some"), sequence(5), sequence(5, variant="some"))
    assert [s.variant for s, _ in scheduler.plan()] == [None, "some", "some"]
