"""docs/checkpoints.md, command by command as it is written, in a folder of its own and on free ports."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.settings import load_settings

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "checkpoints.md").read_text()
SERVED_AT = "http://127.0.0.1:8000"
START_TIMEOUT_S = 280
pytestmark = pytest.mark.timeout(1200)  # on a busy machine
IN_PLACE_OF = {
    ".venv/bin/python": [sys.executable],
    ".venv/bin/libration": [sys.executable, "-m", "server.cli"],
}


def command_blocks():
    return [block.strip().split("\n") for block in re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)]


@pytest.fixture
def folder(tmp_path):
    """What the commands expect around them, and nothing that they write."""
    for name in ("bench", "docs", "keystore"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def arguments(command):
    first, *rest = shlex.split(command)
    return [*IN_PLACE_OF.get(first, [first]), *rest]


def environment(folder):
    return os.environ | {"LIBRATION_DATA_DIR": str(folder / "data"), "PYTHONPATH": str(ROOT)}


def run(command, folder):
    done = subprocess.run(
        arguments(command), cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def serving(command, folder):
    """The server of a command on a free port; gives its address."""
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*arguments(command), "--port", "0"],
            cwd=folder,
            env=environment(folder),
            stdout=stream,
            stderr=stream,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while (found := re.search(r"http://127\.0\.0\.1:\d+(?=/v1)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[0]
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_five_commands_lead_from_nothing_to_a_plastic_mixtral(folder):
    setup, write, serve, complete, keys = command_blocks()[0]
    assert re.search(rf"^{setup.removeprefix('make ')}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    run(write, folder)
    with serving(serve, folder) as address:
        answer = json.loads(run(complete.replace(SERVED_AT, address), folder))
        assert answer["model"] == "tiny-mixtral"
        assert answer["libration"]["key_version"] == 0
        assert answer["libration"]["learned_tokens"] > 256
        deadline = time.monotonic() + 60
        while (row := json.loads(run(keys.replace(SERVED_AT, address), folder))["data"][0])["version"] == 0:
            assert time.monotonic() < deadline, row
        assert (row["endpoint"], row["scope"], row["version"]) == ("tiny-mixtral", "tenant:default", 1)
        assert 0 < row["drift"]["max"] <= 1


@pytest.mark.slow
def test_a_dense_checkpoint_gets_blocks_that_lower_its_loss_and_is_served_with_them(folder):
    write, adapt, serve = command_blocks()[1]
    run(write, folder)
    told = re.search(r"held-out loss (\S+) -> (\S+) nats", run(adapt, folder))
    assert float(told[2]) < float(told[1])
    with serving(serve, folder) as address:
        texts = []
        for model in ("adapted", "original"):
            body = json.dumps(
                {"model": model, "prompt": "def search(self", "max_tokens": 16, "temperature": 0}
            )
            command = (
                f"curl -s {address}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
            )
            texts.append(json.loads(run(command, folder))["choices"][0]["text"])
        assert texts[0] != texts[1]


def test_the_configurations_are_valid(tmp_path):
    examples = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        (tmp_path / "libration.toml").write_text(example)
        assert set(load_settings(tmp_path / "libration.toml").endpoints) == set(
            tomllib.loads(example)["endpoints"]
        )
    assert examples[1] == (ROOT / "docs" / "examples" / "adapted.toml").read_text()
