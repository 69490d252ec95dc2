"""The README's commands, run as they are written against a server of our own."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from server.settings import load_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SERVED_AT = "http://127.0.0.1:8000"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """The lines behind `$`, with their continuations."""
    for block in blocks("console"):
        yield from re.findall(r"^\$ ((?:.*\\\n)*.*)$", block, re.MULTILINE)


def test_every_curl_command_gets_an_answer_and_the_chat_says_paris(start):
    server = start()
    answers = []
    for command in commands():
        assert command.startswith("curl "), command
        shell = command.replace(SERVED_AT, server.url)
        done = subprocess.run(
            ["bash", "-c", shell], capture_output=True, text=True, timeout=120, cwd=ROOT, check=True
        )
        assert "error" not in done.stdout[:20], done.stdout
        answers.append(done.stdout)
    assert len(answers) >= 3
    assert "Paris" in json.loads(answers[0])["choices"][0]["message"]["content"]


def test_the_python_example_streams_an_answer(start):
    server = start()
    (example,) = blocks("python")
    code = example.replace(SERVED_AT, server.url)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True
    )
    assert done.stdout.strip()


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks("sh"):
        (command,) = block.split("\n")[:1]
        target = command.removeprefix("make ")
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE), command


def test_the_configuration_example_is_valid(tmp_path):
    (example,) = blocks("toml")
    (tmp_path / "libration.toml").write_text(example)
    settings = load_settings(tmp_path / "libration.toml")
    assert set(settings.endpoints) == set(tomllib.loads(example)["endpoints"])
