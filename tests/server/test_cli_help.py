"""What `--help` says of every command, as a person reads it on 80 columns."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from server.cli import main

ROOT = Path(__file__).parents[2]


def commands(command: click.Command, *path: str) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *path, name)


EVERY = list(commands(main))


def found(path: tuple[str, ...]) -> click.Command:
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return command


def page(path: tuple[str, ...]) -> str:
    result = CliRunner().invoke(main, [*path, "--help"], env={"COLUMNS": "80"}, prog_name="libration")
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_a_page_fits_and_cuts_nothing_short(path):
    lines = page(path).splitlines()
    assert lines[0].startswith("Usage: libration " + " ".join(path))
    assert all(len(line) <= 80 for line in lines)
    cut = [line for line in lines[1:] if line.rstrip().endswith("...")]
    assert not cut, "the first sentence is too long for the list of commands"


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_a_command_and_each_of_its_options_say_what_they_do(path):
    command = found(path)
    assert command.help
    assert command.help.strip().endswith((".", "`"))
    silent = [
        each.name
        for each in command.params
        if isinstance(each, click.Option) and not getattr(each, "help", None)
    ]
    assert silent == []


def test_a_command_that_answers_with_data_can_print_json():
    """Those that report or change something at once; not the ones that run on and on, or print a file."""
    plain = {"serve", "worker", "chat", "completion", "train", "adapt"}
    for path in EVERY:
        command = found(path)
        if isinstance(command, click.Group) or path[0] in plain or path == ("config", "show"):
            continue
        assert "as_json" in {each.name for each in command.params}, path


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_commands_that_the_documents_name_exist(document):
    """`libration ...` in code: the commands, and the options behind them."""
    for line in re.findall(r"(?:`|/bin/|\$ )libration ([a-z][^`\n|]*)", document.read_text()):
        words, command = line.split(), main
        while words and isinstance(command, click.Group) and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert command is not main, line
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        known = {option for each in command.params for option in each.opts} | {"--help"}
        assert isinstance(command, click.Group) or given <= known, line
