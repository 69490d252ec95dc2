"""Progress bars for a person who waits."""

from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def conversion_progress() -> Callable[[int, int], None]:
    """A bar for the first conversion of the base weights; nothing is shown when nothing is converted."""
    bar: list[tqdm[Any]] = []

    def show(done: int, total: int) -> None:
        if not bar:
            bar.append(tqdm(total=total, desc="converting base weights (first start only)", unit="layer"))
        bar[0].update(done - bar[0].n)
        if done == total:
            bar.pop().close()

    return show
