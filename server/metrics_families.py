"""Families of metrics that collectors fill when Prometheus asks. All names begin alike."""

import itertools
import math
from collections.abc import Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.utils import floatToGoString

PREFIX = "libration_"


def counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, labels=labels)


def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=labels)


def single_gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    family = gauge(name, text)
    family.add_metric([], value)
    return family


def buckets(counts: Mapping[float, int]) -> list[tuple[str, float]]:
    """Upper bounds, rising, with how many were at most so long."""
    bounds = ["+Inf" if math.isinf(bound) else floatToGoString(bound) for bound in counts]
    return list(zip(bounds, map(float, itertools.accumulate(counts.values())), strict=True))
