"""`libration chat` against a server on a real socket."""

import pytest
from click.testing import CliRunner

from server import cli_chat
from server.cli import main


@pytest.fixture
def talk(url):
    """talk(*arguments, said): what the command printed on both streams."""

    def run(*arguments, said):
        command = ["chat", "--url", url, "--temperature", "0", "--max-tokens", "6", *arguments]
        return CliRunner().invoke(main, command, input="".join(f"{line}\n" for line in said))

    return run


def test_an_answer_comes_with_its_key_version_and_experts(talk):
    result = talk(said=["hello", ""])
    assert result.exit_code == 0, result.output
    assert "keys tenant:default version 0" in result.stderr
    assert "tokens to learn from" in result.stderr
    assert "busiest experts layer 1: " in result.stderr


def test_the_conversation_goes_on_with_what_was_said(talk, served, monkeypatch):
    seen = []
    original = served.engine.scheduler.plan

    def plan():
        seen.extend(len(s.prompt_token_ids) for s in served.engine.scheduler.running if not s.prefilled)
        return original()

    monkeypatch.setattr(served.engine.scheduler, "plan", plan)
    assert talk("--plasticity", "off", said=["one", "two", ""]).exit_code == 0
    first, second = seen
    assert second > first + len("two")


def test_ctrl_c_stops_an_answer_and_not_the_conversation(talk, served, monkeypatch, wait_until):
    shown, stopped = cli_chat._show, []

    def interrupted(chunks):
        if stopped:
            return shown(chunks)
        next(chunks)
        stopped.append(chunks)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_chat, "_show", interrupted)
    result = talk("--max-tokens", "2000", said=["one"])
    assert (result.exit_code, "the conversation goes on without it" in result.stderr) == (0, True)
    wait_until(lambda: served.idle)
    result = talk(said=["two", ""])
    assert (result.exit_code, "keys tenant:default" in result.stderr) == (0, True)


@pytest.mark.parametrize("model", ["dense", "moe", "mom", "fm-moe"])
def test_every_variant_can_be_talked_to(talk, model):
    result = talk("--model", model, said=["hello"])
    assert result.exit_code == 0, result.output
    assert ("busiest experts" in result.stderr) == (model != "dense")


def test_what_the_server_refuses_is_told_in_its_words(talk):
    result = talk("--model", "nobody", said=["hello"])
    assert (result.exit_code, "'nobody' does not exist" in result.output) == (1, True)


def test_a_server_that_is_not_there_is_said_to_be_missing():
    result = CliRunner().invoke(main, ["chat", "--url", "http://127.0.0.1:9"], input="hello\n")
    assert (result.exit_code, "libration serve" in result.output) == (1, True)
    assert CliRunner().invoke(main, ["chat", "--url", "ftp://x"], input="hello\n").exit_code == 2
