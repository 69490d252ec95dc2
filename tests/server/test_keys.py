"""The key space over HTTP: what it shows, how it changes, what it announces."""

import asyncio
import base64
import io
import json
import math
import time
from collections import Counter

import httpx
import numpy as np
import pytest

from keystore.records import ScopeId
from server.routes.key_events import MAX_WAITING_EVENTS, Listener

TENANT = ScopeId("tenant", "default")
TEXT = "what is taught here stays here. "


@pytest.fixture
def served(serve, tmp_path):
    with serve(tmp_path) as running:
        yield running


def teach(served, text=TEXT, **fields):
    body = {"model": "some", "prompt": text * 5, "max_tokens": 1, "plasticity": "learn"} | fields
    assert served.post("/v1/completions", body).status_code == 200
    published = served.post("/admin/keys/some/consolidate").json()["published"]
    assert published
    return published[-1]["version"]


def refused(response, status, code):
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code


def test_key_spaces_are_listed_with_version_and_drift(served):
    version = teach(served)
    (row,) = served.get("/v1/keys").json()["data"]
    assert row["endpoint"] == "some"
    assert row["version"] == version
    assert 0 < row["drift"]["mean"] <= row["drift"]["max"] <= 1.000001
    assert row["plastic_layers"] == [2]
    assert row["frozen"] is False


def test_one_key_space_shows_its_layers(served):
    version = teach(served)
    shown = served.get("/v1/keys/some").json()
    assert shown["version"] == version
    assert shown["versions_kept"] == version
    fixed, plastic = shown["layers"]
    assert (fixed["layer"], fixed["plastic"], fixed["drift"]["max"]) == (1, False, 0.0)
    assert plastic["plastic"]
    assert plastic["drift"]["moved"] > 0
    assert plastic["tokens"] > 0


def test_an_old_version_can_be_looked_at(served):
    teach(served)
    assert served.get("/v1/keys/some", params={"version": 0}).json()["drift"]["max"] == 0.0
    refused(served.get("/v1/keys/some", params={"version": 99}), 409, "key_version_unavailable")


def stop_the_clock(served, monkeypatch):
    """From now on no time passes for the experts; returns when it is."""
    usage = served.state.registry.get("some").usage
    now = time.monotonic()
    monkeypatch.setattr(usage, "_clock", lambda: now)
    return now


@pytest.mark.parametrize("sort", ["expert", "usage", "drift", "norm", "distance", "idle"])
def test_experts_are_sorted_and_paged(served, sort, monkeypatch):
    teach(served)
    path = "/v1/keys/some/layers/2"
    stop_the_clock(served, monkeypatch)
    everything = served.get(path, params={"sort": sort}).json()["experts"]
    field = {
        "expert": lambda e: e["expert"],
        "usage": lambda e: e["share"],
        "drift": lambda e: e["drift"],
        "norm": lambda e: e["norm"],
        "distance": lambda e: e["nearest"]["distance"],
        "idle": lambda e: math.inf if e["idle_s"] is None else e["idle_s"],
    }[sort]
    values = [field(e) for e in everything]
    assert values == sorted(values, reverse=True)
    page = served.get(path, params={"sort": sort, "offset": 2, "limit": 3}).json()["experts"]
    assert page == everything[2:5]
    rising = served.get(path, params={"sort": sort, "order": "asc"}).json()["experts"]
    assert [field(e) for e in rising] == sorted(values)


def test_the_numbers_of_a_layer_are_those_of_its_keys(served):
    teach(served)
    view = served.store.view(TENANT)
    keys, anchors = view.keys_of(2).astype(float), served.store.view(ScopeId("anchor")).keys_of(2)
    usage = served.state.registry.get("some").usage.counts[:, 1]
    for row in served.get("/v1/keys/some/layers/2").json()["experts"]:
        e = row["expert"]
        away = np.linalg.norm(keys - keys[e], axis=1)
        away[e] = np.inf
        assert row["nearest"]["expert"] == away.argmin()
        assert row["nearest"]["distance"] == pytest.approx(away.min())
        assert row["norm"] == pytest.approx(np.linalg.norm(keys[e]))
        assert row["drift"] == pytest.approx(
            np.linalg.norm(keys[e] - anchors[e]) / np.linalg.norm(anchors[e])
        )
        assert row["drift_of_radius"] == pytest.approx(row["drift"] / 0.2)
        assert [row["usage"]["prefill"], row["usage"]["decode"]] == usage[:, e].tolist()


def test_an_expert_is_idle_from_its_last_token_on(served, monkeypatch):
    path = "/v1/keys/some/layers/2"
    rows = served.get(path, params={"sort": "idle"}).json()["experts"]
    assert [row["idle_s"] for row in rows] == [None] * 8, "nothing was routed yet"
    usage = served.state.registry.get("some").usage
    selected = []
    for now in (100.0, 130.0):
        monkeypatch.setattr(usage, "_clock", lambda now=now: now)
        before = usage.of_layer(2).sum(axis=0)
        served.post("/v1/completions", {"model": "some", "prompt": str(now)[:2], "max_tokens": 1})
        selected.append(set(np.flatnonzero(usage.of_layer(2).sum(axis=0) - before).tolist()))
    first, second = selected
    expected = dict.fromkeys(second, 0.0) | dict.fromkeys(first - second, 30.0)
    assert 0 < len(expected) < 8
    rows = served.get(path, params={"sort": "idle"}).json()["experts"]
    assert {row["expert"]: row["idle_s"] for row in rows} == {e: expected.get(e) for e in range(8)}
    assert rows[0]["idle_s"] is None


def test_versions_are_listed_newest_first(served):
    first = teach(served)
    second = teach(served, "something else entirely ")
    listed = served.get("/v1/keys/some/versions").json()
    assert [row["version"] for row in listed["data"]] == list(range(second, 0, -1))
    assert listed["data"][0]["parent"] == second - 1
    assert listed["data"][second - first]["version"] == first
    assert served.get("/v1/keys/some/versions", params={"limit": 1}).json()["data"] == listed["data"][:1]


def test_a_session_learns_for_itself(served):
    teach(served, session_id="mine")
    assert served.get("/v1/keys/some").json()["version"] == 0
    assert served.get("/v1/keys/some", params={"session_id": "mine"}).json()["version"] >= 1
    assert served.get("/v1/keys/some", params={"scope": "session:default/mine"}).json()["version"] >= 1


def test_a_text_search_finds_what_the_engine_routes_to(served):
    teach(served)
    answer = served.post("/v1/keys/some/layers/2/search", {"text": "héy you", "k": 8}).json()
    assert answer["tokens"][0]["text"] == "h"
    assert len(answer["tokens"]) == 8
    usage = served.state.registry.get("some").usage
    before = usage.counts[0, 1].copy()
    body = {"model": "some", "prompt": "héy you", "max_tokens": 1, "plasticity": "read"}
    served.post("/v1/completions", body)
    routed = np.zeros(8, dtype=int)
    for token in answer["tokens"]:
        assert sum(e["gate"] for e in token["experts"]) == pytest.approx(1)
        scores = [e["score"] for e in token["experts"]]
        assert scores == sorted(scores, reverse=True)
        for e in token["experts"][:2]:
            routed[e["expert"]] += 1
    assert (usage.counts[0, 1] - before).tolist() == routed.tolist()


def test_a_long_text_is_searched_over_several_chunks_and_teaches_nothing(served):
    answer = served.post("/v1/keys/some/layers/2/search", {"text": "x" * 128, "k": 1}).json()
    assert len(answer["tokens"]) == 128
    assert served.post("/admin/keys/some/consolidate").json()["published"] == []


def test_a_vector_search_ranks_by_inner_product(served):
    vector = np.random.default_rng(0).standard_normal(16)
    anchors = served.store.view(ScopeId("anchor")).keys_of(1)
    found = served.post("/v1/keys/some/layers/1/search", {"vector": vector.tolist(), "k": 3}).json()[
        "experts"
    ]
    assert [e["expert"] for e in found] == np.argsort(-(anchors @ vector))[:3].tolist()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "vector": [0.0] * 16}, "text"),
        ({"text": ""}, "text"),
        ({"vector": [0.0] * 15}, "vector"),
        ({"vector": [1e31] * 16}, "vector.0"),
        ({"vector": ["1"] * 16}, "vector.0"),
        ({"text": "a", "k": 9}, "k"),
        ({"text": "a", "k": 0}, "k"),
    ],
)
def test_bad_searches_are_named(served, body, param):
    response = served.post("/v1/keys/some/layers/2/search", body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_layer_whose_keys_never_move_is_searched_by_vector_only(served):
    response = served.post("/v1/keys/some/layers/1/search", {"text": "a", "k": 2})
    assert response.json()["error"]["param"] == "text"


@pytest.mark.parametrize(
    ("path", "params", "status", "code"),
    [
        ("/v1/keys/nobody", {}, 404, "model_not_found"),
        ("/v1/keys/dense", {}, 404, "not_found"),
        ("/v1/keys/some/layers/0", {}, 404, "not_found"),
        ("/v1/keys/some/layers/99999999999999999999999", {}, 404, "not_found"),
        ("/v1/keys/some/layers/two", {}, 400, "invalid_type"),
        ("/v1/keys/some/layers/2", {"sort": "beauty"}, 400, "invalid_value"),
        ("/v1/keys/some/layers/2", {"order": "up"}, 400, "invalid_value"),
        ("/v1/keys/some/layers/2", {"limit": 0}, 400, "invalid_value"),
        ("/v1/keys/some/layers/2", {"offset": -1}, 400, "invalid_value"),
        ("/v1/keys/some", {"scope": "everyone"}, 400, "invalid_value"),
        ("/v1/keys/some", {"scope": "anchor", "session_id": "a"}, 400, "invalid_value"),
        ("/v1/keys/some", {"session_id": " a"}, 400, "invalid_value"),
        ("/v1/keys/some", {"version": -1}, 400, "invalid_value"),
    ],
)
def test_bad_questions_are_refused(served, path, params, status, code):
    refused(served.get(path, params=params), status, code)


def test_frozen_keys_stay_and_teach_nobody(served):
    assert served.post("/admin/keys/some/freeze").json()["frozen"] is True
    assert served.get("/v1/keys/some").json()["frozen"] is True
    answer = served.post("/v1/completions", {"model": "some", "prompt": TEXT * 5, "max_tokens": 1}).json()
    assert answer["libration"]["learned_tokens"] == 0
    assert served.post("/admin/keys/some/consolidate").json()["published"] == []
    assert served.post("/admin/keys/some/unfreeze").json()["frozen"] is False
    teach(served)


def test_one_scope_can_be_frozen_alone(served):
    served.post("/admin/keys/some/freeze", {"scope": "tenant:default"})
    assert served.get("/v1/keys/some").json()["frozen"] is True
    assert served.get("/v1/keys/some", params={"scope": "tenant:other"}).json()["frozen"] is False


def test_rollback_brings_an_old_version_back_as_a_new_one(served):
    version = teach(served)
    learned = served.get("/v1/keys/some").json()["checksum"]
    back = served.post("/admin/keys/some/rollback", {"to_version": 0, "if_version": version}).json()
    assert back == {"endpoint": "some", "scope": "tenant:default", "version": version + 1}
    assert served.get("/v1/keys/some").json()["drift"]["max"] == 0.0
    served.post("/admin/keys/some/rollback", {"to_version": version})
    assert served.get("/v1/keys/some").json()["checksum"] == learned
    assert served.post("/admin/keys/some/reset").json()["version"] == version + 3
    assert served.get("/v1/keys/some").json()["drift"]["max"] == 0.0


def test_a_snapshot_is_a_file_in_the_servers_folder_and_comes_back(served, tmp_path):
    version = teach(served)
    learned = served.get("/v1/keys/some").json()["checksum"]
    written = served.post("/admin/keys/some/snapshot", {"name": "before"}).json()
    assert (written["version"], written["name"], written["checksum"]) == (version, "before", learned)
    assert [each.name for each in (tmp_path / "snapshots").iterdir()] == ["before.safetensors"]
    served.post("/admin/keys/some/reset")
    back = served.post("/admin/keys/some/restore", {"name": "before", "if_version": version + 1}).json()
    assert back == {"endpoint": "some", "scope": "tenant:default", "version": version + 2}
    assert served.get("/v1/keys/some").json()["checksum"] == learned
    newest = served.get("/v1/keys/some/versions").json()["data"][0]
    assert newest["reason"] == f"restore of before.safetensors, there version {version}"


def test_a_snapshot_goes_to_another_scope_and_replaces_no_file(served):
    teach(served)
    assert served.post("/admin/keys/some/snapshot", {"name": "a", "version": 1}).status_code == 200
    refused(served.post("/admin/keys/some/snapshot", {"name": "a", "version": 0}), 409, "conflict")
    back = served.post("/admin/keys/some/restore", {"name": "a", "scope": "tenant:other"}).json()
    assert back["version"] == 1
    refused(served.post("/admin/keys/some/restore", {"name": "a", "if_version": 99}), 409, "conflict")
    missing = served.post("/admin/keys/some/snapshot", {"name": "b", "version": 99})
    refused(missing, 409, "key_version_unavailable")


def test_a_restore_drops_what_waits_for_its_scope(served, wait_until):
    served.post("/admin/keys/some/snapshot", {"name": "anchors"})
    body = {"model": "some", "prompt": TEXT * 4 + "!", "max_tokens": 1, "plasticity": "learn"}
    served.post("/v1/completions", body)
    wait_until(lambda: served.store.counters().waiting_windows == 2)  # lessons follow the answer
    served.post("/admin/keys/some/restore", {"name": "anchors"})
    assert served.post("/admin/keys/some/consolidate").json()["published"] == []


@pytest.mark.parametrize("name", ["", ".", "..", "../keys", "/etc/passwd", "a/b", "a.b", "a\\b", "-a", "a" * 65,
                                  "a\n", "a\0", "é", "a b", None, 5])  # fmt: skip
@pytest.mark.parametrize("action", ["snapshot", "restore"])
def test_a_snapshots_name_is_no_path(served, tmp_path, action, name):
    assert served.post(f"/admin/keys/some/{action}", {"name": name}).status_code == 400
    assert not (tmp_path / "snapshots").exists()


def test_a_file_that_is_no_snapshot_is_named(served, tmp_path):
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "bad.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "snapshots" / "out.safetensors").symlink_to(tmp_path / "keys.sqlite3")
    response = served.post("/admin/keys/some/restore", {"name": "bad"})
    refused(response, 400, "invalid_value")
    assert response.json()["error"]["message"].startswith("bad.safetensors: header of")
    assert response.json()["error"]["param"] == "name"
    for missing in ("none", "out"):
        refused(served.post("/admin/keys/some/restore", {"name": missing}), 404, "not_found")
    assert served.get("/v1/keys/some").json()["version"] == 0


def test_a_change_on_another_version_than_expected_is_409(served):
    response = served.post("/admin/keys/some/reset", {"if_version": 7})
    refused(response, 409, "conflict")
    assert response.headers["x-should-retry"] == "false"
    refused(served.post("/admin/keys/some/rollback", {"to_version": 99}), 409, "key_version_unavailable")


@pytest.mark.parametrize(
    ("action", "body"),
    [
        ("rollback", {}),
        ("rollback", {"to_version": "1"}),
        ("rollback", {"to_version": -1}),
        ("reset", {"scope": "anchor"}),
        ("reset", {"scope": "nobody"}),
        ("freeze", {"scope": 5}),
        ("freeze", {"scope": "session:x"}),
        ("consolidate", {"now": True}),
    ],
)
def test_bad_changes_are_refused(served, action, body):
    assert served.post(f"/admin/keys/some/{action}", body).status_code == 400


def test_a_pinned_version_answers_as_it_did(served):
    body = {"model": "some", "prompt": "pinned", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    before = served.post("/v1/completions", body | {"plasticity": "read"}).json()
    version = teach(served)
    after = served.post("/v1/completions", body | {"key_version": 0}).json()
    assert after["choices"] == before["choices"]
    assert after["libration"]["key_version"] == 0
    assert after["libration"]["plasticity"] == "read"
    newest = served.post("/v1/completions", body | {"plasticity": "read"})
    assert newest.headers["X-Key-Version"] == str(version)


@pytest.mark.parametrize("stream", [False, True])
def test_a_version_that_was_kept_once_expires(serve, tmp_path, stream):
    body = {"model": "some", "prompt": "pinned", "max_tokens": 4, "key_version": 2, "stream": stream}
    with serve(tmp_path, versions_on_disk=4) as served:
        assert teach(served) >= 2
        assert served.post("/v1/completions", body).headers["X-Key-Version"] == "2"
        newest = teach(served, prompt=TEXT * 64)
        response = served.post("/v1/completions", body)
        refused(response, 409, "key_version_unavailable")
        assert response.headers["x-should-retry"] == "false"
        assert response.json()["error"]["param"] == "key_version"
        for path in ("", "/layers/2", "/layers/2/experts/0", "/layers/2/projection"):
            refused(served.get(f"/v1/keys/some{path}", params={"version": 2}), 409, "key_version_unavailable")
        refused(served.post("/admin/keys/some/rollback", {"to_version": 2}), 409, "key_version_unavailable")
        kept = [row["version"] for row in served.get("/v1/keys/some/versions").json()["data"]]
        assert kept[:4] == [newest, newest - 1, newest - 2, newest - 3]
        assert 2 not in kept
        for version in (0, kept[-1], kept[3]):
            assert served.post("/v1/completions", body | {"key_version": version}).status_code == 200


def test_events_tell_new_versions_and_who_moved(served, listening):
    async def listen(url):
        async with (
            served.client() as quick,
            httpx.AsyncClient(base_url=url) as client,
            client.stream("GET", "/v1/keys/some/events") as response,
        ):
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith(":")
            await quick.post("/v1/completions", json={"model": "some", "prompt": TEXT * 3, "max_tokens": 1})
            await quick.post("/admin/keys/some/consolidate")
            line = ""
            while not line.startswith("data: "):
                line = await anext(lines)
            return json.loads(line.removeprefix("data: "))

    with listening(served.app) as url:
        event = asyncio.run(asyncio.wait_for(listen(url), 10))
    assert event["version"] == 1
    assert event["parent"] == 0
    assert event["scope"] == "tenant:default"
    assert event["moved"]["2"]
    assert "1" not in event["moved"]
    assert event["missed"] == 0


def test_a_listener_that_does_not_read_loses_the_oldest_and_is_told(served):
    async def fall_behind():
        listener = Listener(served.store, TENANT, asyncio.get_running_loop())
        for _ in range(MAX_WAITING_EVENTS + 3):
            await asyncio.to_thread(served.store.reset, TENANT)
        first = await listener.next(5)
        listener.close()
        return first.version, listener.missed

    assert asyncio.run(fall_behind()) == (4, 3)


def test_a_listener_that_leaves_is_forgotten(served, listening, wait_until):
    async def come_and_go(url):
        async with (
            httpx.AsyncClient(base_url=url) as client,
            client.stream("GET", "/v1/keys/some/events") as response,
        ):
            await anext(response.aiter_lines())
            assert len(served.app.state.listeners) == 1

    with listening(served.app) as url:
        asyncio.run(come_and_go(url))
        assert wait_until(lambda: not served.app.state.listeners) < 1.5
        assert not len(served.store.news.published)


def test_listeners_are_let_go_when_the_server_drains(served, listening):
    async def outlast(url):
        async with (
            httpx.AsyncClient(base_url=url) as client,
            client.stream("GET", "/v1/keys/some/events") as response,
        ):
            lines = response.aiter_lines()
            await anext(lines)
            served.runner.begin_drain()
            async for _ in lines:
                pass

    with listening(served.app) as url:
        asyncio.run(asyncio.wait_for(outlast(url), 3))


def test_listeners_are_bounded(served, monkeypatch):
    monkeypatch.setattr("server.routes.key_events.MAX_LISTENERS", 0)
    refused(served.get("/v1/keys/some/events"), 503, "server_overloaded")


def test_a_layers_picture_keeps_its_axes_while_keys_move(served):
    before = served.get("/v1/keys/some/layers/2/projection").json()
    assert before["anchors"] == before["keys"]
    version = teach(served)
    after = served.get("/v1/keys/some/layers/2/projection").json()
    assert after["version"] == version
    assert after["anchors"] == before["anchors"]
    assert after["keys"] != before["keys"]
    assert np.array(after["keys"]).shape == (8, 2)
    assert 0 < after["explained"] <= 1


def test_one_expert_is_shown_with_its_neighbours_and_history(served):
    teach(served)
    newest = teach(served, "something else entirely ")
    row = next(each for each in served.get("/v1/keys/some/layers/2").json()["experts"] if each["drift"] > 0)
    shown = served.get(f"/v1/keys/some/layers/2/experts/{row['expert']}").json()
    assert {name: shown[name] for name in ("usage", "share", "drift", "norm")} == {
        name: row[name] for name in ("usage", "share", "drift", "norm")
    }
    assert shown["nearest"][0] == row["nearest"]
    assert len(shown["nearest"]) == 7
    assert [each["version"] for each in shown["history"]] == list(range(newest, 0, -1))
    assert shown["history"][0]["drift"] == pytest.approx(shown["drift"])
    limited = served.get(f"/v1/keys/some/layers/2/experts/{row['expert']}", params={"limit": 1}).json()
    assert limited["history"] == shown["history"][:1]


def test_an_experts_peers_are_those_that_worked_on_the_same_tokens(served):
    body = {"model": "some", "prompt": TEXT * 2, "max_tokens": 4, "ignore_eos": True}
    answer = served.post("/v1/completions", body | {"return_routed_experts": True}).json()
    routed = np.load(io.BytesIO(base64.b64decode(answer["choices"][0]["routed_experts"])))[:, 1]
    for expert in range(8):
        shared = routed[(routed == expert).any(axis=1)]
        others = Counter(shared[shared != expert].tolist())
        shown = served.get(f"/v1/keys/some/layers/2/experts/{expert}").json()["coactivated"]
        assert shown["window_tokens"] == len(routed)
        assert shown["tokens"] == len(shared)
        assert {peer["expert"]: peer["tokens"] for peer in shown["peers"]} == others
        counts = [peer["tokens"] for peer in shown["peers"]]
        assert counts == sorted(counts, reverse=True)
        assert all(peer["share"] == peer["tokens"] / len(shared) for peer in shown["peers"])


@pytest.mark.parametrize(
    "path", ["layers/2/experts/8", "layers/2/experts/-1", "layers/7/experts/0", "layers/7/projection"]
)
def test_an_expert_or_layer_that_is_not_there_is_a_404(served, path):
    refused(served.get(f"/v1/keys/some/{path}"), 404, "not_found")


def test_usage_as_npz_is_the_matrix_of_the_json(served):
    teach(served)
    response = served.get("/v1/keys/some/usage", params={"format": "npz"})
    with np.load(io.BytesIO(response.content), allow_pickle=False) as arrays:
        assert arrays["counts"].tolist() == served.get("/v1/keys/some/usage").json()["counts"]
        assert arrays["layers"].tolist() == [1, 2]
    refused(served.get("/v1/keys/some/usage", params={"format": "xml"}), 400, "invalid_value")
