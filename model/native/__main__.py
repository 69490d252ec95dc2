"""Compile ahead of the first start: `python -m model.native`, the last step of `make setup`."""

import shutil
import sys
import time

from model.native.compiled import compile_native, kept_folder
from model.native.decoder import supported


def main() -> None:
    if not supported():
        print("this processor has no AVX-512 VNNI: nothing to compile ahead")
        return
    started = time.monotonic()
    known, folder = compile_native(), kept_folder()
    for older in folder.parent.glob("native-*"):
        if older != folder:
            shutil.rmtree(older)
    if not known:
        print(f"compiled model/native in {time.monotonic() - started:.0f} s")
    if not folder.exists():
        sys.exit(f"{folder.parent} cannot be written")


if __name__ == "__main__":
    main()
