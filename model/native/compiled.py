"""Everything that is compiled, ahead of its first use, and kept for the next start."""

import hashlib
import os
from pathlib import Path

from numba.core import config

from model.native.decode import work
from model.native.experts import choose, mix_silu, mix_swiglu, project

_ROW, _ROWS, _STACK = "float32[::1]", "float32[:, ::1]", "float32[:, :, ::1]"
_PACKED = "uint8[:, :, :, ::1]"
_JOB = ", ".join(
    (
        _ROWS,
        "Tuple((int64[::1], int64[:, ::1]))",
        f"Tuple(({', '.join([_PACKED] * 4)}, {_STACK}))",
        f"Tuple((uint8[:, :, ::1], {_ROW}, {_ROWS}))",
        f"Tuple((int8[:, :, :, ::1], {_STACK}, {', '.join([_ROWS] * 4)}))",
        f"Tuple(({_ROWS}, {_ROWS}, float32))",
        "int64, int64",
    )
)
_SELECTED = f"{_ROWS}, int64[:, ::1], {_ROWS}"
ENTRIES = {
    work: f"int64[::1], boolean, int64, int64, {_JOB}",
    project: f"{_ROWS}, {_ROW}, float32, {_ROWS}, {_ROWS}, {_ROWS}",
    choose: f"{_ROWS}, boolean, {_ROWS}, int64[:, ::1]",
    mix_silu: f"{_SELECTED}, {_STACK}, {_STACK}, {_ROWS}",
    mix_swiglu: f"{_SELECTED}, {_STACK}, {_STACK}, {_STACK}, {_ROWS}",
}


def compile_native(folder: Path) -> None:
    """Compile, or take what an earlier start compiled: from beside the sources, or `folder` where those are read-only.

    What is kept lies under a name by the sources, which numba does not look at.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sorted(here.glob("*.py")))).hexdigest()
    beside = here / "__pycache__"
    kept = beside if os.access(beside if beside.exists() else here, os.W_OK) else folder
    config.CACHE_DIR = str(kept / f"native-{digest[:16]}")  # pyright: ignore[reportAttributeAccessIssue] - made at run time
    for entry, arguments in ENTRIES.items():
        entry.enable_caching()
        entry.compile(f"void({arguments})")
