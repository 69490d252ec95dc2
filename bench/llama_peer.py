"""llama.cpp on the same GGUF file, through npm's node-llama-cpp with its prebuilt binary."""

import shutil
import subprocess
from pathlib import Path

from peer_process import Missing, PeerProcess

VERSION = "3.22.1"
SCRIPT = Path(__file__).with_name("llama_peer.mjs")
INSTALL_TIMEOUT_S = 600


def install(folder: Path) -> None:
    """Put node-llama-cpp into a folder of our own. Raises Missing."""
    npm = shutil.which("npm")
    if npm is None:
        raise Missing("llama.cpp: npm is not installed")
    packages = (f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/linux-x64@{VERSION}")
    options = ("--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund")
    command = [npm, "install", "--prefix", str(folder), *options, *packages]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_TIMEOUT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        told = (error.stderr or b"").decode(errors="replace").strip()
        raise Missing(f"llama.cpp: npm could not install node-llama-cpp {VERSION}: {told[:300]}") from error
    shutil.copy(SCRIPT, folder / SCRIPT.name)  # node looks for packages beside the script


def start(folder: Path, model: Path, threads: int, streams: int) -> PeerProcess:
    """A process with so many threads that can write so many texts at once. Raises Missing."""
    name = f"llama.cpp (node-llama-cpp {VERSION}), {threads} thread{'s' * (threads > 1)}"
    return PeerProcess(name, ["node", str(folder / SCRIPT.name), str(model), str(threads), str(streams)])
