"""Where and from what a measurement came: commit, processor, versions, and how busy the machine was before it began."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUSY = 0.25  # load a core, above which figures are of a busy machine


def described(threads: int) -> dict[str, str]:
    """Call it before anything is computed: load averages look back."""
    cores = len(os.sched_getaffinity(0))
    loads = os.getloadavg()
    busy = " - NOT A QUIET MACHINE" if loads[0] > BUSY * cores else ""
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{_processor()}, {cores} cores",
        "threads": str(threads),
        "load before it began": f"{loads[0]:.2f} (1 minute), {loads[1]:.2f} (5 minutes){busy}",
        "versions": f"Python {platform.python_version()}, torch {version('torch')}",
    }


def lines(machine: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in machine.items())


def _commit() -> str:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return "unknown, there is no git here"
    changed = len(_git("status", "--porcelain").splitlines())
    return _git("rev-parse", "--short=12", "HEAD") + (f" and {changed} changed files" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    """Virtual machines tell a short name; family and model say which it is."""
    pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    told = {name.strip(): value.strip() for name, _, value in pairs}
    if "cpu family" not in told:
        return platform.machine()
    return f"{told['model name']} (family {told['cpu family']}, model {told['model']})"
