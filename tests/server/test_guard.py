"""The canary, the scope that everybody teaches, and every operation on every kind of scope, over HTTP."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from keystore.canary import GuardConfig
from keystore.records import GravityConfig, ScopeId
from server.auth import ApiKey, ApiKeys
from server.canary_text import CANARY_TOKENS, canary_windows

GLOBAL, TENANT = ScopeId("global"), ScopeId("tenant", "default")
TEXT = "what is taught here is for everybody. " * 2
FAR = {"window_tokens": 64, "trust_radius": 0.5, "global_trust_radius": 0.5}
HARMFUL = GravityConfig(rule="literal", plasticity_rate=0.3, **FAR)  # measured to raise the canary's loss
DRIFTING = GravityConfig(plasticity_rate=0.3, **FAR)
ANYTHING = GuardConfig(max_loss_increase=100.0, min_overlap=0.0)
NOTHING_WORSE = GuardConfig(max_loss_increase=0.0, min_overlap=0.0)
KEYS = {name: {"Authorization": f"Bearer {name}-key"} for name in ("alice", "bob", "root")}


@pytest.fixture
def everybodys(serve, tmp_path):
    """everybodys(guard, gravity): a server whose requests teach the global scope, with three API keys."""

    @contextmanager
    def served(guard=ANYTHING, gravity=DRIFTING) -> Iterator:
        api_keys = ApiKeys(
            [
                ApiKey.of("alice-key", "alice", "user"),
                ApiKey.of("bob-key", "bob", "user"),
                ApiKey.of("root-key", "ops", "admin"),
            ]
        )
        with serve(
            tmp_path, gravity=gravity, guard=guard, learn_scope="global", api_keys=api_keys
        ) as running:
            yield running

    return served


def complete(served, headers, **fields):
    body = {"model": "some", "prompt": TEXT, "max_tokens": 4, "temperature": 0, "ignore_eos": True} | fields
    response = served.post("/v1/completions", body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def consolidate(served, headers):
    return served.post("/admin/keys/some/consolidate", headers=headers).json()["published"]


def samples(served, headers):
    page = served.get("/metrics", headers=headers).text
    return {
        (sample.name.removeprefix("libration_"), *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def test_what_one_teaches_globally_everybody_reads(everybodys):
    with everybodys() as served:
        first = complete(served, KEYS["bob"], plasticity="read")
        told = complete(served, KEYS["alice"])["libration"]
        assert told == {"key_version": 0, "scope": "global", "plasticity": "learn", "learned_tokens": 75}
        assert consolidate(served, KEYS["root"]) == [{"scope": "global", "version": 1}]
        after = complete(served, KEYS["bob"], plasticity="read")
        assert (after["libration"]["key_version"], after["libration"]["scope"]) == (1, "global")
        pinned = complete(served, KEYS["bob"], key_version=0)
        assert pinned["choices"] == first["choices"]
        assert complete(served, KEYS["bob"], plasticity="off")["choices"] == first["choices"]
        assert served.store.view(ScopeId("tenant", "alice")).version == 0


def test_a_session_beside_the_global_scope_is_its_tenants(everybodys):
    with everybodys() as served:
        complete(served, KEYS["alice"])
        complete(served, KEYS["alice"], session_id="own")
        published = consolidate(served, KEYS["root"])
        assert {each["scope"] for each in published} == {"global", "session:alice/own"}
        first = served.store.versions(ScopeId("session", "alice", "own"))[-1]
        assert (first.version, first.parent) == (1, 0), "forked from its tenant, which learns nothing here"


def test_a_user_key_sees_the_global_scope_and_cannot_change_it(everybodys):
    with everybodys() as served:
        complete(served, KEYS["alice"])
        consolidate(served, KEYS["root"])
        for params in ({}, {"scope": "global"}):
            shown = served.get("/v1/keys/some", headers=KEYS["bob"], params=params).json()
            assert (shown["scope"], shown["version"], shown["trust_radius"]) == ("global", 1, 0.5)
            (row,) = served.get("/v1/keys", headers=KEYS["bob"], params=params).json()["data"]
            assert (row["scope"], row["version"]) == ("global", 1)
        (version,) = served.get("/v1/keys/some/versions", headers=KEYS["bob"]).json()["data"]
        assert version["reason"].startswith("learned from 75 tokens; canary loss ")
        assert 0 < version["drift"]["max"] <= 1
        for action, body in (("rollback", {"to_version": 0}), ("reset", {}), ("freeze", {})):
            refused = served.post(
                f"/admin/keys/some/{action}", body | {"scope": "global"}, headers=KEYS["bob"]
            )
            assert refused.status_code == 403
        other = served.get("/v1/keys/some", headers=KEYS["bob"], params={"scope": "tenant:alice"})
        assert other.status_code == 403
        assert served.store.view(GLOBAL).version == 1


def test_where_tenants_learn_for_themselves_a_user_key_does_not_see_the_global_scope(serve, tmp_path):
    api_keys = ApiKeys([ApiKey.of("alice-key", "alice", "user")])
    with serve(tmp_path, api_keys=api_keys) as served:
        assert (
            served.get("/v1/keys/some", headers=KEYS["alice"], params={"scope": "global"}).status_code == 403
        )


def test_an_administrator_rolls_the_global_scope_back_for_everybody(everybodys):
    with everybodys() as served:
        before = complete(served, KEYS["bob"], plasticity="read")
        complete(served, KEYS["alice"])
        consolidate(served, KEYS["root"])
        done = served.post("/admin/keys/some/rollback", {"to_version": 0}, headers=KEYS["root"]).json()
        assert done == {"endpoint": "some", "scope": "global", "version": 2}
        after = complete(served, KEYS["bob"], plasticity="read")
        assert (after["choices"], after["libration"]["key_version"]) == (before["choices"], 2)
        assert samples(served, KEYS["root"])["rollbacks_total", "admin", "some"] == 1


def test_a_global_version_that_hurts_is_not_published(everybodys, log_lines):
    with everybodys(NOTHING_WORSE, HARMFUL) as served:
        before = complete(served, KEYS["bob"], plasticity="read")
        assert served.get("/v1/keys/some", headers=KEYS["bob"]).json()["canary"] is None
        complete(served, KEYS["alice"])
        assert consolidate(served, KEYS["root"]) == []
        after = complete(served, KEYS["bob"], plasticity="read")
        assert (after["choices"], after["libration"]["key_version"]) == (before["choices"], 0)
        shown = served.get("/v1/keys/some", headers=KEYS["bob"]).json()
        canary = shown["canary"]
        assert (shown["version"], canary["version"], canary["passed"]) == (0, 1, False)
        assert canary["loss_nats"] > canary["anchors_loss_nats"] > 0
        assert 0 < canary["overlap"] < 1
        found = samples(served, KEYS["root"])
        assert found["key_updates_total", "guard_rejected", "some"] == 2
        assert found["key_updates_total", "published", "some"] == 0
        assert found["canary_loss_nats", "some", "worst"] == canary["loss_nats"]
        assert found["canary_loss_nats", "anchors", "some"] == canary["anchors_loss_nats"]
        assert found["canary_overlap_ratio", "some"] == canary["overlap"]
        (line,) = [json.loads(each) for each in log_lines if "canary failed" in each]
        assert (line["message"], line["scope"]) == ("canary failed: 2 windows are not published", "global")
        assert line["loss_increase"] == canary["loss_increase"] > 0
        assert not any(TEXT[:20] in each for each in log_lines)


def test_a_tenant_that_drifts_is_rolled_back_within_two_periods(serve, tmp_path, log_lines):
    guard = GuardConfig(max_loss_increase=100.0, min_overlap=0.85, tenant_every_versions=2)
    with serve(tmp_path, gravity=DRIFTING, guard=guard) as served:
        passed = []
        for _ in range(8):
            complete(served, {}, plasticity="learn", prompt=TEXT * 2)
            published = consolidate(served, {})
            canary = served.get("/v1/keys/some").json()["canary"]
            if not canary["passed"]:
                break
            passed.append(canary["version"])
        assert canary["overlap"] < 0.85
        assert passed, "the first windows move little"
        assert canary["version"] - passed[-1] <= 2 * guard.tenant_every_versions
        newest, failed, *_ = served.get("/v1/keys/some/versions").json()["data"]
        assert newest["version"] == published[-1]["version"] + 1
        assert newest["reason"].startswith(f"rollback to {passed[-1]}: canary loss ")
        assert newest["checksum"] == served.store.view(TENANT, passed[-1]).checksum != failed["checksum"]
        assert complete(served, {}, plasticity="read")["libration"]["key_version"] == newest["version"]
        assert samples(served, {})["rollbacks_total", "canary", "some"] == 1
        assert any(f"going back to version {passed[-1]}" in each for each in log_lines)


def test_a_probe_leaves_no_mark_on_usage_and_engine(serve, tmp_path):
    with serve(tmp_path, guard=GuardConfig(100.0, 0.0, 1)) as served:
        complete(served, {}, plasticity="learn")
        usage, steps = served.get("/v1/keys/some/usage").json(), served.engine.counters.steps
        assert consolidate(served, {})
        assert served.store.canary_readings()
        assert served.get("/v1/keys/some/usage").json() == usage
        assert served.engine.counters.steps == steps


@pytest.mark.parametrize("scope", ["global", "tenant:default", "session:default/chat"])
def test_every_operation_works_on_every_kind_of_scope(serve, tmp_path, scope):
    learn_scope = "global" if scope == "global" else "tenant"
    session = {"session_id": "chat"} if scope.startswith("session") else {}

    def act(served, action, **body):
        response = served.post(f"/admin/keys/some/{action}", {"scope": scope} | body)
        assert response.status_code == 200, response.text
        return response.json()

    def shown(served):
        return served.get("/v1/keys/some", params={"scope": scope}).json()

    with serve(tmp_path, guard=ANYTHING, gravity=DRIFTING, learn_scope=learn_scope) as served:
        answer = complete(served, {}, plasticity="learn", **session)
        assert answer["libration"]["scope"] == scope
        version = consolidate(served, {})[-1]["version"]
        learned = shown(served)
        assert (learned["version"], learned["drift"]["max"] > 0) == (version, True)

        assert act(served, "snapshot", name="kept")["version"] == version
        assert act(served, "reset", if_version=version)["version"] == version + 1
        assert shown(served)["drift"]["max"] == 0
        assert act(served, "rollback", to_version=version)["version"] == version + 2
        assert shown(served)["checksum"] == learned["checksum"]
        act(served, "rollback", to_version=0)
        assert act(served, "restore", name="kept", if_version=version + 3)["version"] == version + 4
        assert shown(served)["checksum"] == learned["checksum"]
        stale = served.post("/admin/keys/some/reset", {"scope": scope, "if_version": version})
        assert stale.status_code == 409

        pinned = complete(served, {}, key_version=0, **session)
        assert pinned["choices"] == complete(served, {}, plasticity="off", **session)["choices"]
        assert pinned["libration"]["key_version"] == 0
        moved = complete(served, {}, key_version=version, **session)
        assert moved["choices"] == complete(served, {}, plasticity="read", **session)["choices"]

        assert act(served, "freeze")["frozen"] is True
        assert complete(served, {}, plasticity="learn", **session)["libration"]["learned_tokens"] == 0
        assert consolidate(served, {}) == []
        assert act(served, "unfreeze")["frozen"] is False
        assert complete(served, {}, plasticity="learn", **session)["libration"]["learned_tokens"] > 0
        assert consolidate(served, {})
        trail = served.get("/admin/keys/some/audit", params={"scope": scope}).json()
        assert trail["verified"] == served.store.verify_audit() >= len(trail["data"])
        told = {(event["event"], event.get("reason")) for event in trail["data"]}
        assert {event["scope"] for event in trail["data"]} == {scope}
        restored = f"restore of kept.safetensors, there version {version}"
        reasons = ("reset to the anchors", f"rollback to {version}", "rollback to 0", restored)
        assert {("freeze", None), ("unfreeze", None), *(("commit", reason) for reason in reasons)} <= told
        assert (("canary", None) in told) is (scope == "global")
        assert served.get("/admin/keys/some/audit", params={"limit": 1}).json()["data"] == trail["data"][:1]


def test_the_canary_text_is_prose_and_code_of_the_interpreter(canary, tokenizer):
    windows = canary()
    assert windows.shape[0] * (windows.shape[1] - 1) >= CANARY_TOKENS
    prose, code = (tokenizer.decode(half[:, 1:].flatten().tolist()) for half in windows.chunk(2))
    assert "statement" in prose
    assert "import re" in code


def test_a_canary_file_is_read_in_order(tokenizer, tmp_path):
    text = "".join(f"line {number}\n" for number in range(2000))
    (tmp_path / "canary.txt").write_text(text)
    windows = canary_windows(tokenizer, tmp_path / "canary.txt", 100)
    assert windows.shape == (82, 101)
    assert tokenizer.decode([*windows[:, :-1].flatten().tolist(), int(windows[-1, -1])]) == text[:8201]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"too short " * 800, "holds 8000 tokens; allowed: 8193 or more"), (b"\xff" * 9000, "is not UTF-8")],
)
def test_a_canary_file_that_will_not_do_is_named(tokenizer, tmp_path, content, message):
    (tmp_path / "canary.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"canary\.txt.*{message}"):
        canary_windows(tokenizer, tmp_path / "canary.txt", 4096)
