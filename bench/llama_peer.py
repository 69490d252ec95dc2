"""llama.cpp on the same GGUF file, through npm's node-llama-cpp with its prebuilt binary, in a process of its own."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

VERSION = "3.22.1"
SCRIPT = Path(__file__).with_name("llama_peer.mjs")
INSTALL_TIMEOUT_S = 600


class Missing(Exception):
    """The peer is not here, and why."""


def install(folder: Path) -> str:
    """Put node-llama-cpp into a folder of our own; returns what it is called. Raises Missing."""
    npm = shutil.which("npm")
    if npm is None:
        raise Missing("npm is not installed")
    packages = (f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/linux-x64@{VERSION}")
    command = [
        npm,
        "install",
        "--prefix",
        str(folder),
        "--omit=optional",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
    ]
    try:
        subprocess.run([*command, *packages], check=True, capture_output=True, timeout=INSTALL_TIMEOUT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise Missing(f"npm could not install node-llama-cpp {VERSION}: {error}") from error
    shutil.copy(SCRIPT, folder / SCRIPT.name)  # node looks for packages beside the script
    return f"llama.cpp (node-llama-cpp {VERSION})"


class LlamaCpp:
    """A process that generates greedily when asked to."""

    def __init__(self, folder: Path, model: Path, threads: int, sequences: int):
        command = ["node", str(folder / SCRIPT.name), str(model), str(threads), str(sequences)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        try:
            self._answer()
        except (json.JSONDecodeError, OSError) as error:
            self.stop()
            raise Missing("node-llama-cpp did not start: its own message is above") from error

    def generate(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        """Seconds of all the prompts with so many new tokens each, and until every one has its first."""
        assert self._process.stdin is not None, "a pipe was asked for"
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        return self._answer()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None, "a pipe was asked for"
        return json.loads(self._process.stdout.readline())
