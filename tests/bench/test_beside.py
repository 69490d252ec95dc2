"""The arithmetic of bench/beside.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))  # its files are scripts and import each other

from beside import Round, gaps, row


def test_gaps_are_within_one_stream_and_within_the_time():
    stamps = [[0.0, 1.0, 3.0, 6.0], [2.5, 2.75, 9.0]]
    assert gaps(stamps, 0.5, 6.0) == [2.0, 3.0, 0.25]


def test_a_row_tells_milliseconds_and_how_many_times_as_long_the_slowest_take():
    quiet, disturbed = [0.010] * 99 + [0.020], [0.015] * 99 + [0.060]
    told = row("dense", 8, [Round(quiet, disturbed, 2.0, 1.0)] * 3)
    assert told == "| dense | 8 | 10.0 / 10.1 | 15.0 / 15.4 | 1.50 | 1.53 | 2.0 (1.0) |"
