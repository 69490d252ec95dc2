"""Families of metrics that collectors fill when Prometheus asks. All names begin alike."""

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

PREFIX = "libration_"


def counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, labels=labels)


def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=labels)


def single_gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    family = gauge(name, text)
    family.add_metric([], value)
    return family
