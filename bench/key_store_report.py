"""Markdown tables, line by line as the figures come."""

from collections.abc import Sequence

import numpy as np


def percentiles_ms(seconds: Sequence[float]) -> str:
    return " | ".join(f"{1000 * np.percentile(seconds, percent):.1f}" for percent in (50, 99))


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def heading(title: str, *columns: str) -> None:
    print(f"\n{title}\n")
    row(*columns)
    print("|" + "---|" * len(columns))
