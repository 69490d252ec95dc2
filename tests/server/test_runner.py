"""The engine's thread: what it takes in before it begins."""

import threading
import time

import pytest

from model.sampling import SamplingParams
from server.engine import runner as runner_module
from server.engine.counters import Observers
from server.engine.engine import Engine
from server.engine.runner import EngineRunner
from server.engine.scheduler import SchedulerConfig
from server.engine.sequence import Sequence


@pytest.fixture
def runner(tiny):
    nobody = Observers(*[lambda endpoint, seconds: None] * 4)
    engine = Engine(tiny.model, {}, SchedulerConfig(), 1024, {"dense": frozenset()}, time.monotonic, nobody)
    made = EngineRunner(engine, 1)
    yield made
    made.stop(10)


def prompt(number, ended):
    return Sequence(
        sequence_id=str(number),
        prompt_token_ids=(5, 6, 7 + number),
        params=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        endpoint="dense",
        variant=None,
        keys=None,
        teach=None,
        deliver=lambda event: ended.release(),
        eos_token_id=2,
        arrived_at=time.monotonic(),
    )


def test_prompts_that_come_one_after_another_to_an_idle_engine_are_read_in_one_step(runner, monkeypatch):
    monkeypatch.setattr(runner_module, "GATHER_S", 1.0)  # on a busy machine, too
    monkeypatch.setattr(runner_module, "GATHER_AT_MOST_S", 1.0)
    ended = threading.Semaphore(0)
    runner.start()
    for number in range(3):
        runner.submit(prompt(number, ended))
        time.sleep(0.05)
    for _ in range(3):
        assert ended.acquire(timeout=60)
    assert runner.engine.counters.steps == 1
    assert runner.engine.counters.prompt_tokens["dense"] == 9
