"""The arithmetic and the report of bench/compare.py, and its way to peers in processes of their own."""

import asyncio
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))  # its files are scripts and import each other

import llama_peer
import machine
from compare import NEW_TOKENS, STREAMS, Side, measure, take_turns
from compare_report import Comparison, Cost, Figures, report
from libration_server import peak_mb, token_ids
from peer_process import Missing, PeerProcess

ONE, TWO = "llama.cpp, 1 thread", "llama.cpp, 2 threads"
FIGURES = {
    "dense": [(100.0, 300.0, 0.5), (50.0, 150.0, 1.0), (200.0, 600.0, 0.25)],
    "transformers 1.0": [(25.0, 100.0, 0.65), (10.0, 40.0, 1.4), (50.0, 200.0, 0.3)],
    ONE: [(80.0, 110.0, 2.0), (40.0, 55.0, 4.0), (160.0, 220.0, 1.0)],
    TWO: [(60.0, 140.0, 1.5), (30.0, 70.0, 3.0), (120.0, 280.0, 0.75)],
}
ECHO = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({"seconds": len(asked["prompts"]) * asked["tokens"] / 100}), flush=True)
"""


def rounds_of(figures: Sequence[tuple[float, float, float]]) -> list[Figures]:
    return [dict(zip(("one", "eight", "first"), each, strict=True)) for each in figures]


def compared(peers: Mapping[str, Sequence[str]], missing: Sequence[str] = ()) -> Comparison:
    sides = ["dense", *(side for group in peers.values() for side in group)]
    return Comparison(
        machine={"commit": "abc"},
        results={side: rounds_of(FIGURES[side]) for side in sides},
        peers=peers,
        costs={"Libration, all endpoints": Cost(5.0, 1300.0)},
        converting_s=20.0,
        missing=missing,
    )


def row_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_ratios_are_of_the_same_round_and_to_the_best_thread_count_of_each_column():
    text = report(compared({"transformers": ["transformers 1.0"], "llama.cpp": [ONE, TWO]}))
    assert row_of(text, "dense") == ["100.0 (4.00x, 1.25x)", "300 (3.00x, 2.14x)", "0.50 (1.30x, 3.00x)"]
    assert row_of(text, ONE) == ["80.0", "110", "2.00"]
    assert "llama.cpp at its best thread count (1 thread, 2 threads, 2 threads)" in text
    # 100 beside 25 is 4, but 50 beside 10 is 5: the median of three ratios, not the ratio of two medians.
    comparison = compared({"transformers": ["transformers 1.0"]})
    assert comparison.times_as_fast("dense", "one", "transformers 1.0") == pytest.approx(4.0)
    assert comparison.times_as_fast("dense", "first", "transformers 1.0") == pytest.approx(1.3)


def test_every_target_is_told_as_met_missed_or_not_measured():
    text = report(compared({"transformers": ["transformers 1.0"], "llama.cpp": [ONE, TWO]}))
    assert row_of(text, "`dense`, 1 stream, to transformers") == ["4.0x", "4.00x", "met"]
    assert row_of(text, "`dense`, 1 stream, to llama.cpp") == ["1.3x", "1.25x", "missed"]
    assert row_of(text, "`dense`, 8 streams, to llama.cpp's one") == ["4.0x", "3.75x", "missed"]
    assert row_of(text, "`some` frozen, 1 stream, to `moe`") == ["0.9x", "not measured", ""]
    assert row_of(text, "start to ready") == ["under 6 s", "5.0 s", "met"]
    assert row_of(text, "peak resident memory") == ["under 1200 MB", "1300 MB", "missed"]


def test_a_missing_peer_is_named_and_never_guessed():
    reason = "llama.cpp: npm is not installed"
    text = report(compared({"transformers": ["transformers 1.0"], "llama.cpp": []}, [reason]))
    assert f"Missing: {reason}" in text
    assert row_of(text, "dense")[0] == "100.0 (4.00x)"
    assert row_of(text, "`dense`, 1 stream, to llama.cpp") == ["1.3x", "not measured", ""]


def test_without_npm_llama_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Missing, match="npm is not installed"):
        llama_peer.install(tmp_path)


def test_what_npm_says_is_why_llama_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Missing, match=r"could not install node-llama-cpp .*: no network"):
        llama_peer.install(tmp_path)


def test_a_peer_that_ends_before_it_is_ready_is_missing():
    with pytest.raises(Missing, match="fake did not start"):
        PeerProcess("fake", [sys.executable, "-c", "raise SystemExit(1)"])


def test_a_peer_is_measured_through_its_pipe():
    peer = PeerProcess("fake", [sys.executable, "-c", ECHO])
    try:
        figures = asyncio.run(measure(Side("fake", peer.generate, 0.0), 0))
        assert figures["first"] == pytest.approx(0.01)
        assert figures["one"] == pytest.approx(NEW_TOKENS / (0.01 * NEW_TOKENS))
        assert figures["eight"] == pytest.approx(100.0)
        assert peer.ready_s > 0
        assert peer.peak_mb() > 1
    finally:
        peer.stop()


def test_everybody_gets_the_same_prompts_each_round_and_no_prompt_comes_twice():
    seen: dict[str, list[tuple[int, ...]]] = {"a": [], "b": [], "c": []}
    order: list[str] = []

    def side(name: str) -> Side:
        async def generate(prompts: list[list[int]], tokens: int) -> float:
            seen[name] += [tuple(prompt) for prompt in prompts]
            order.append(name)
            return 1.0

        return Side(name, generate, 0.0)

    results = asyncio.run(take_turns([side("a"), side("b"), side("c")], rounds=7))
    assert seen["a"] == seen["b"] == seen["c"]
    assert len({prompt[:8] for prompt in seen["a"]}) == 8 * (2 + STREAMS), "no common beginnings either"
    turns = ["".join(order[at : at + 9 : 3]) for at in range(0, len(order), 9)]
    assert [sorted(turn) for turn in turns] == [["a", "b", "c"]] * 8, "everybody once a round"
    assert {turn[turn.index("a") - 1] for turn in turns if turn[0] != "a"} == {"b", "c"}, (
        "nobody has one neighbour"
    )
    assert [len(each) for each in results.values()] == [7] * 3, "the first round is not counted"


def test_the_machine_is_told_with_commit_and_load():
    described = machine.described(2)
    assert len(described["commit"].split()[0]) == 12
    assert float(described["load before it began"].split()[0]) >= 0
    assert "cores" in described["processor"]


def test_peak_memory_is_that_of_a_process_that_has_given_it_back():
    code = "block = b'1' * 200_000_000; del block; print(); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 200 <= peak_mb(process.pid) <= 300
        process.communicate(b"\n")


def test_token_ids_are_the_same_for_a_seed():
    assert token_ids(5, 1) == token_ids(5, 1) != token_ids(5, 2)
