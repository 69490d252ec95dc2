"""`libration bench` against a server on a real socket, and `libration convert` on files."""

import json

import pytest
from click.testing import CliRunner

from server.cli import main

FEW = ("--prompt-tokens", "7", "--new-tokens", "5", "--rounds", "2", "--streams", "1", "--streams", "3")


@pytest.fixture
def measure(url):
    return lambda *arguments: CliRunner().invoke(main, ["bench", "--url", url, *FEW, *arguments])


def test_every_answer_is_asked_for_and_timed(measure, served):
    before = served.engine.counters.prompt_tokens["moe"], served.engine.counters.generated_tokens["moe"]
    result = measure("--model", "moe", "--json")
    assert result.exit_code == 0, result.output
    alone, together = json.loads(result.stdout)
    assert (alone["streams"], together["streams"]) == (1, 3)
    for row in (alone, together):
        assert 0 < row["first_token_s"] <= row["slowest_first_token_s"]
        assert row["total_tokens_per_s"] > 0
        assert row["stream_tokens_per_s"] > 0
    answers = 1 + 2 * (1 + 3)  # the first is not measured
    assert served.engine.counters.prompt_tokens["moe"] - before[0] == 7 * answers
    assert served.engine.counters.generated_tokens["moe"] - before[1] == 5 * answers


def test_measuring_teaches_nothing_unless_asked_to(measure, served):
    assert measure("--model", "some").exit_code == 0
    assert served.post("/admin/keys/some/consolidate").json()["published"] == []
    assert measure("--model", "some", "--plasticity", "learn").exit_code == 0
    assert served.post("/admin/keys/some/consolidate").json()["published"]


def test_a_table_is_shown_to_a_person(measure):
    head, *rows = measure("--model", "dense").stdout.splitlines()
    assert head.split()[:3] == ["model", "streams", "first_token_s"]
    assert [row.split()[:2] for row in rows] == [["dense", "1"], ["dense", "3"]]


def test_what_the_server_refuses_is_told_in_its_words(measure):
    for arguments, words in (
        (("--model", "no body"), "'no body' does not exist"),
        (("--model", "dense", "--plasticity", "learn"), "has no routing keys"),
        (("--model", "dense", "--prompt-tokens", "5000"), "5000"),
    ):
        result = measure(*arguments)
        assert (result.exit_code, words in result.output) == (1, True), result.output
    nobody = CliRunner().invoke(main, ["bench", "--url", "http://127.0.0.1:9"])
    assert (nobody.exit_code, "libration serve" in nobody.output) == (1, True)


def test_a_models_files_are_checked_ahead_of_the_first_start(checkpoint, tmp_path):
    folder = checkpoint("mixtral")[0]
    command = ["convert", "--data-dir", str(tmp_path), "--model", str(folder)]
    result = CliRunner().invoke(main, [*command, "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["model"], row["layers"], row["dtype"]) == (str(folder), 3, "bfloat16")
    missing = CliRunner().invoke(main, ["convert", "--data-dir", str(tmp_path), "--model", "nowhere"])
    assert (missing.exit_code, "is neither a folder nor a file" in missing.output) == (1, True)
