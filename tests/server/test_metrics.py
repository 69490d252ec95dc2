"""The metrics page says what happened, and the same as the other routes."""

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Metrics
from server.settings import MetricsSettings

BODY = {"model": "some", "prompt": "count my tokens", "max_tokens": 9, "ignore_eos": True}


def samples(served) -> dict:
    page = served.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parsed(page.text)


def parsed(page) -> dict:
    return {
        (sample.name.removeprefix("libration_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def value(found, name, **labels):
    return found[name, tuple(sorted(labels.items()))]


@pytest.fixture(scope="module")
def used(served):
    for model in ("some", "some", "dense"):
        assert served.post("/v1/completions", BODY | {"model": model}).status_code == 200
    served.post("/v1/completions", BODY | {"model": "nobody"})
    return served


def test_tokens_and_requests_are_counted_by_model(used):
    found = samples(used)
    assert value(found, "prompt_tokens_total", model="some") == 30
    assert value(found, "prompt_tokens_total", model="dense") == 15
    assert value(found, "generation_tokens_total", model="some") == 18
    assert value(found, "request_finished_total", model="some", reason="length") == 2
    assert value(found, "requests_rejected_total", reason="model_not_found") == 1
    assert value(found, "requests_running", model="some") == 0
    assert value(found, "requests_waiting", model="some") == 0
    assert value(found, "kv_cache_usage_ratio") == 0
    assert value(found, "build_info", version="0.0.test") == 1


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("request_duration_seconds", 2),
        ("time_to_first_token_seconds", 2),
        ("queue_time_seconds", 2),
        ("inter_token_latency_seconds", 16),
    ],
)
def test_latencies_are_observed(used, name, count):
    assert value(samples(used), f"{name}_count", model="some") == count


def test_expert_tokens_are_exactly_the_usage_matrix(used):
    usage = used.get("/v1/keys/some/usage").json()
    found = samples(used)
    for p, phase in enumerate(usage["phases"]):
        for i, layer in enumerate(usage["layers"]):
            counts = usage["counts"][p][i]
            labels = {"model": "some", "layer": str(layer), "phase": phase}
            assert value(found, "layer_routed_tokens_total", **labels) == sum(counts) / 2
            for expert, count in enumerate(counts):
                assert value(found, "expert_tokens_total", expert=str(expert), **labels) == count
    assert sum(map(sum, usage["counts"][0])) == 2 * 30 * 2  # layers x prompt tokens x experts per token


def test_balance_and_keys_are_shown_by_layer(used):
    found = samples(used)
    for layer in ("1", "2"):
        labels = {"model": "some", "layer": layer}
        assert value(found, "expert_load_imbalance_ratio", **labels) >= 1
        assert 0 < value(found, "expert_load_jain_index", **labels) <= 1
        assert 0 < value(found, "routing_entropy_ratio", **labels) <= 1
        assert 0 <= value(found, "experts_idle", **labels) < 8
        assert value(found, "key_drift_ratio", stat="max", **labels) == 0
        assert value(found, "key_min_distance", **labels) > 0
    assert value(found, "key_version", model="some") == 0
    assert value(found, "plasticity_enabled", model="some") == 1
    assert value(found, "plasticity_enabled", model="dense") == 0
    assert value(found, "credit_waiting_tokens", model="some") == 0
    assert value(found, "store_degraded", model="some") == 0
    assert value(found, "key_updates_total", model="some", outcome="published") == 0
    assert value(found, "routing_events_dropped_total", model="some", reason="queue_full") == 0


def test_learning_moves_the_key_metrics(used):
    used.post("/v1/completions", BODY | {"prompt": "learn this " * 20})
    assert used.post("/admin/keys/some/consolidate").json()["published"]
    found = samples(used)
    version = used.get("/v1/keys/some").json()["version"]
    assert version >= 1
    assert value(found, "key_version", model="some") == version
    assert value(found, "key_drift_ratio", model="some", layer="2", stat="max") > 0
    assert value(found, "key_drift_ratio", model="some", layer="1", stat="max") == 0
    assert value(found, "key_updates_total", model="some", outcome="published") == version


def test_indexes_of_large_layers_are_shown_when_there_are_any(used, monkeypatch):
    assert not any(name.startswith("key_index") for name, _ in samples(used))
    counters = replace(
        used.store.counters(), index_recall={2: 0.99}, index_builds={(2, "built"): 3, (2, "failed"): 0}
    )
    monkeypatch.setattr(used.store, "counters", lambda: counters)
    found = samples(used)
    assert value(found, "key_index_recall_ratio", model="some", layer="2") == 0.99
    assert value(found, "key_index_rebuilds_total", model="some", layer="2", outcome="built") == 3


def test_expert_detail_is_left_out_above_the_limit(used, monkeypatch):
    monkeypatch.setattr("server.metrics_experts.EXPERT_DETAIL_LIMIT", 15)  # two layers of 8 experts are 16
    found = samples(used)
    detailed = {dict(labels)["model"] for name, labels in found if name == "expert_tokens_total"}
    assert detailed == {"mom", "fm-moe"}
    assert any(name == "layer_routed_tokens_total" for name, _ in found)


@pytest.mark.parametrize(("detail", "limit", "shown"), [("always", 0, True), ("never", 10**6, False)])
def test_expert_detail_is_shown_as_configured(used, monkeypatch, detail, limit, shown):
    monkeypatch.setattr("server.metrics_experts.EXPERT_DETAIL_LIMIT", limit)
    metrics = Metrics()
    metrics.watch(used.state.registry, "0", MetricsSettings(expert_detail=detail))
    names = {name for name, _ in parsed(metrics.page().decode())}
    assert ("expert_tokens_total" in names) is shown
    assert "layer_routed_tokens_total" in names


def test_vllms_names_tell_the_same_figures_when_asked_for(used):
    assert not any(name.startswith("vllm:") for name, _ in samples(used))
    metrics = Metrics()
    metrics.watch(used.state.registry, "0", MetricsSettings(compat="vllm"))
    metrics.observers().first_token("some", 0.02)
    used.engine.counters.finished["some", "cancelled"] += 1
    found = parsed(metrics.page().decode())
    for theirs, ours in (("prompt_tokens", "prompt_tokens"), ("generation_tokens", "generation_tokens")):
        told = value(found, f"vllm:{theirs}_total", model_name="some")
        assert told == value(found, f"{ours}_total", model="some") > 0
    succeeded = value(found, "vllm:request_success_total", model_name="some", finished_reason="length")
    assert succeeded == value(found, "request_finished_total", model="some", reason="length") > 0
    assert not any("cancelled" in dict(labels).values() for name, labels in found if "vllm" in name)
    assert value(found, "vllm:num_requests_running", model_name="some") == 0
    assert value(found, "vllm:kv_cache_usage_perc") == 0
    assert value(found, "vllm:time_to_first_token_seconds_bucket", model_name="some", le="0.025") == 1
    assert value(found, "vllm:time_to_first_token_seconds_count", model_name="some") == 1


def test_what_the_storage_takes_is_counted_by_operation(serve, tmp_path):
    with serve(tmp_path) as served:
        assert (
            value(samples(served), "store_operation_duration_seconds_count", model="some", op="commit") == 0
        )
        served.post("/v1/completions", BODY | {"prompt": "learn this " * 20})
        published = served.post("/admin/keys/some/consolidate").json()["published"]
        served.post("/admin/keys/some/reset")
        found = samples(served)
        commits = value(found, "store_operation_duration_seconds_count", model="some", op="commit")
        assert 2 <= commits <= len(published) + 1
        assert value(found, "store_operation_duration_seconds_sum", model="some", op="commit") > 0
        assert (
            value(found, "store_operation_duration_seconds_bucket", model="some", op="load", le="+Inf") == 0
        )


def test_two_applications_share_no_metrics(serve, tmp_path, used):
    with serve(tmp_path) as other:
        assert ("request_duration_seconds_count", (("model", "some"),)) not in samples(other)
