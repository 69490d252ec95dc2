"""Process crash: consolidating processes are killed by -9, at random times and ahead of every kind of step.

Each process goes on where the last one was killed. What one acknowledged, the next must find; at most the commit
in flight is there on top, whole; and every state that was ever seen must be the one that an uninterrupted
process goes through, on a file.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis_server import RedisServer

PROGRAM = Path(__file__).with_name("consolidating.py")
EMBEDDED_STEPS = "BEGIN IMMEDIATE", "COMMIT", "xWrite", "xSync", "xTruncate", "publish", "acknowledge"
SHARED_STEPS = "send_packed_command", "read_response", "publish", "acknowledge"
LONGEST_LIFE_S = 0.08  # after it began to open the store, or had opened it
SURVEYED_COMMITS = 3  # of which one moves the log into the file

Line = dict[str, Any]  # Any: what a process says, parsed
Kill = Callable[[str], list[Line]]  # runs a process on a store until it is dead; what it said


@contextmanager
def consolidating(store: str, *step: str) -> Iterator[tuple[subprocess.Popen[str], Iterator[Line]]]:
    """A process and what it says, as it comes."""
    command = [sys.executable, str(PROGRAM), store, *step]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROGRAM.parents[2]) as process:
        assert process.stdout
        try:
            yield process, map(json.loads, process.stdout)
        finally:
            process.kill()


def kill_at_random(rng: np.random.Generator, store: str) -> list[Line]:
    with consolidating(store) as (process, lines):
        heard = [next(lines) for _ in range(rng.integers(1, 3))]
        time.sleep(rng.uniform(0, LONGEST_LIFE_S))
        process.kill()
        return heard + list(lines)


def kill_at_step(name: str, count: int, store: str) -> list[Line]:
    with consolidating(store, name, str(count)) as (process, lines):
        heard = list(lines)
        assert process.wait() == -signal.SIGKILL, (name, count)
        return heard


class Uninterrupted:
    """A process that nobody kills before the end of the tests; it waits while nobody listens."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._known: dict[int, Line] = {}

    def at(self, version: int) -> Line:
        """What it said when it had committed a version."""
        while version not in self._known:
            line = next(self._lines)
            if line["word"] != "opening":
                self._known[line["versions"][0]] = line
        return self._known[version]


def steps_of(store: str, phase: str) -> list[tuple[str, int]]:
    """Every step of making a store ("open") or of its first commits ("commit"): its kind, and the how manieth."""
    with consolidating(store) as (_, lines):
        taken = Uninterrupted(lines).at(SURVEYED_COMMITS)["steps"]
    return [(name, n) for name in taken if name.startswith(phase) for n in range(1, taken[name] + 1)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Uninterrupted]:
    with consolidating(str(tmp_path_factory.mktemp("whole") / "keys.sqlite3")) as (_, lines):
        yield Uninterrupted(lines)


def survive(kills: Sequence[Kill], store: str, uninterrupted: Uninterrupted) -> int:
    """Returns the newest version that was acknowledged."""
    acknowledged = 0
    for kill in kills:
        for line in kill(store):
            if line["word"] == "opening":
                continue
            version, of_other = line["versions"]
            assert version == of_other, "the two tenants of a commit move together"
            if line["word"] == "opened":
                assert version in (acknowledged, acknowledged + 1), "at most the commit in flight is new"
                assert line["audited"] == 2 * version, "one audit row a version"
            acknowledged = version
            assert line["checksums"] == uninterrupted.at(version)["checksums"]
    return acknowledged


def mixed(kills: list[Kill], total: int) -> list[Kill]:
    """These and enough at random times, in random order."""
    rng = np.random.default_rng(0)
    kills = kills + [partial(kill_at_random, rng)] * (total - len(kills))
    return [kills[i] for i in rng.permutation(len(kills))]


def at_steps(steps: Sequence[tuple[str, int]]) -> list[Kill]:
    return [partial(kill_at_step, *step) for step in steps]


def kill_with_redis(redis: RedisServer, rng: np.random.Generator, store: str) -> list[Line]:
    """Redis is killed first, and comes back."""
    with consolidating(store) as (process, lines):
        heard = [next(lines), next(lines)]
        time.sleep(rng.uniform(0, LONGEST_LIFE_S))
        redis.stop(signal.SIGKILL)
        process.kill()
        redis.start()
        return heard + list(lines)


def survive_beside(
    redis: RedisServer, some: Callable[[str], int], total: int, uninterrupted: Uninterrupted
) -> None:
    """Killed at every `some(kind)`th step of each kind; a tenth of the times Redis is, too."""
    steps = steps_of(f"redis://127.0.0.1:{redis.port}/1", "commit")
    assert {name for name, _ in steps} == {f"commit {kind}" for kind in SHARED_STEPS}
    kills = at_steps([(name, n) for name, n in steps if n % some(name) == 1 % some(name)])
    kills += [partial(kill_with_redis, redis, np.random.default_rng(1))] * (total // 10)
    assert survive(mixed(kills, total), redis.url, uninterrupted) > 3


def test_no_acknowledged_consolidation_is_lost_in_30_kills(tmp_path, uninterrupted) -> None:
    first = [step for step in steps_of(str(tmp_path / "survey.sqlite3"), "commit") if step[1] == 1]
    assert {f"commit {kind}" for kind in EMBEDDED_STEPS} < {name for name, _ in first}
    of_making = partial(kill_at_step, "open xDelete", 1)  # the first journal is done with
    kills = [of_making, *mixed(at_steps(first), 29)]
    assert survive(kills, str(tmp_path / "keys.sqlite3"), uninterrupted) > 3


def test_no_acknowledged_consolidation_is_lost_in_30_kills_beside_redis(redis_server, uninterrupted) -> None:
    every = {"commit send_packed_command": 2, "commit read_response": 8, "commit publish": 6}
    survive_beside(redis_server, lambda kind: every.get(kind, 3), 30, uninterrupted)


@pytest.mark.slow
def test_no_acknowledged_consolidation_is_lost_in_300_kills(tmp_path, uninterrupted) -> None:
    kills = at_steps(steps_of(str(tmp_path / "survey.sqlite3"), "commit"))
    assert survive(mixed(kills, 300), str(tmp_path / "keys.sqlite3"), uninterrupted) > 3


@pytest.mark.slow
def test_no_acknowledged_consolidation_is_lost_in_300_kills_beside_redis(redis_server, uninterrupted) -> None:
    survive_beside(redis_server, lambda _: 1, 300, uninterrupted)


@pytest.mark.slow
def test_a_store_whose_making_was_killed_is_made_by_the_next_process(tmp_path, uninterrupted) -> None:
    steps = steps_of(str(tmp_path / "survey.sqlite3"), "open")
    for number, kill in enumerate(at_steps(steps)):
        kills = [kill, partial(kill_at_step, "commit acknowledge", 2)]
        assert survive(kills, str(tmp_path / f"{number}.sqlite3"), uninterrupted) == 1
