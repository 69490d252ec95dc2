"""Progress bars for a person who waits."""

from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def conversion_progress() -> Callable[[int, int], None]:
    """A bar while weights are converted or read; nothing is shown when they are mapped as they are."""
    bar: list[tqdm[Any]] = []

    def show(done: int, total: int) -> None:
        if not bar:
            bar.append(tqdm(total=total, desc="preparing weights", unit="part"))
        bar[0].update(done - bar[0].n)
        if done == total:
            bar.pop().close()

    return show
