"""The commands of docs/api.md, run as they are written. Their answers have the fields that are shown."""

import json
import re
import subprocess
import sys
from pathlib import Path

DOCS = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
SERVED_AT = "http://127.0.0.1:8000"
EVENT = "data: "


def examples():
    """Commands with the answers that are shown. A command's further lines are indented."""
    for block in re.findall(r"```console\n(.*?)```", DOCS, re.DOTALL):
        for command, answer in re.findall(r"^\$ (.*(?:\n[ ]+.*)*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            yield command, answer.strip()


def shape(value):
    """Names and kinds, of a list those of its first item."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return (
        "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
    )


def same(ours, shown):
    """Null stands for anything: what has not happened yet, or not been asked for."""
    if "NoneType" in (ours, shown):
        return True
    if isinstance(ours, dict) and isinstance(shown, dict):
        return ours.keys() == shown.keys() and all(same(ours[name], shown[name]) for name in ours)
    if isinstance(ours, list) and isinstance(shown, list):
        return not ours or not shown or same(ours[0], shown[0])
    return ours == shown


def parsed(answer):
    """The object of an answer, or the first and the last of a stream's that ended properly."""
    if not answer.startswith(EVENT):
        return json.loads(answer)
    events = [line.removeprefix(EVENT) for line in answer.splitlines() if line]
    assert events[-1] == "[DONE]"
    return {"first": json.loads(events[0]), "last": json.loads(events[-2])}


def test_every_command_answers_with_what_is_shown(start):
    server = start()
    commands = list(examples())
    assert len(commands) == DOCS.count("\n$ ")
    for command, shown in commands:
        done = subprocess.run(
            ["bash", "-c", command.replace(SERVED_AT, server.url)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        ours, expected = shape(parsed(done.stdout)), shape(parsed(shown))
        assert same(ours, expected), f"{command}\n{ours}\n{expected}"
    (example,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example.replace(SERVED_AT, server.url)],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert re.fullmatch(r"sentiment='(good|bad)' certain=(True|False)", done.stdout.strip())
