"""Writes deploy/locks: the pins of the image with the hashes of their files, for x86-64 and Arm.

    python deploy/make_locks.py

Run it after every change of requirements.lock. `serving.lock` holds all of that, `build.lock` what builds the wheel;
the pins themselves come from requirements.lock and requirements-dev.lock.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
BUILD = ("hatchling", "packaging", "pathspec", "pluggy", "trove-classifiers")
PLATFORMS = (
    *(f"manylinux_2_{minor}" for minor in range(36, 16, -1)),
    "manylinux2014",
)  # Debian 12 has glibc 2.36
MACHINES = ("x86_64", "aarch64")


def pins(lock: str) -> list[str]:
    """Every "name==version" of one of the project's locks."""
    return [line for line in (HERE.parent / lock).read_text().splitlines() if line and line[0] != "#"]


def hashes(wanted: list[str], machine: str) -> dict[str, str]:
    """The SHA-256 of the wheel that each pin means on a machine."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        platforms = [f"--platform={platform}_{machine}" for platform in PLATFORMS]
        options = [
            "--dry-run",
            "--ignore-installed",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version=3.11",
        ]
        command = [sys.executable, "-m", "pip", "install", "--quiet", *options, *platforms]
        command += [f"--target={folder}", f"--report={report}", *wanted]
        subprocess.run(command, check=True)  # noqa: S603 - our own pins
        found = json.loads(report.read_text())["install"]
    by_name = {
        _plain(each["metadata"]["name"]): each["download_info"]["archive_info"]["hashes"]["sha256"]
        for each in found
    }
    return {pin: by_name[_plain(pin.partition("==")[0])] for pin in wanted}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def write_lock(path: Path, wanted: list[str]) -> None:
    """One pin a line; where all machines share a wheel there is one hash."""
    found = [hashes(wanted, machine) for machine in MACHINES]
    lines = [
        " ".join([pin, *(f"--hash=sha256:{each}" for each in sorted({of[pin] for of in found}))])
        for pin in wanted
    ]
    path.write_text("# Made by deploy/make_locks.py.\n" + "\n".join(lines) + "\n")


def main() -> None:
    serving, development = pins("requirements.lock"), pins("requirements-dev.lock")
    (HERE / "locks").mkdir(exist_ok=True)
    write_lock(HERE / "locks" / "serving.lock", serving)
    building = [pin for pin in serving + development if pin.partition("==")[0] in BUILD]
    write_lock(HERE / "locks" / "build.lock", building)


if __name__ == "__main__":
    main()
