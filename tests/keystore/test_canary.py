"""The guard: nothing that harms the canary becomes everybody's, and a tenant does not keep it."""

import logging
import threading
from collections.abc import Callable

import numpy as np
import pytest

from keystore.canary import CanaryRun, Guard, GuardConfig, routing_overlap
from keystore.errors import (
    CanaryFailed,
    InvalidConfig,
    InvalidSnapshot,
    KeyVersionUnavailable,
    VersionConflict,
)
from keystore.gravity import check_bounds
from keystore.records import GravityConfig, ScopeId
from keystore.worker import ConsolidationWorker

GLOBAL, TENANT = ScopeId("global"), ScopeId("tenant", "default")
SESSION = ScopeId("session", "default", "a")
BORN, ADDED = 16, 2  # experts of a layer
HOME = {3: np.array([[0, 1], [2, 3]]), 5: np.array([[0, 1], [2, 3]])}


class FakeProbe:
    """Says what it is told of every version but the anchors, which lose 2 nats while they are the born ones."""

    def __init__(self) -> None:
        self.loss_nats, self.expert_ids = 2.0, HOME
        self.promoted_loss_nats, self.anchors_seen = 2.0, []
        self.seen: list[tuple[str, int]] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def run(self, view):
        if view.version == 0:
            visible = view.visible_ids(3)
            self.anchors_seen.append(len(view.keys_of(3)) if visible is None else len(visible))
            if self.anchors_seen[-1] == BORN:
                return CanaryRun(2.0, HOME)
            self.meanwhile()
            return CanaryRun(self.promoted_loss_nats, HOME)
        self.seen.append((str(view.scope), view.version))
        self.meanwhile()
        return CanaryRun(self.loss_nats, self.expert_ids)


@pytest.fixture
def probe() -> FakeProbe:
    return FakeProbe()


@pytest.fixture
def open_guarded(open_here, probe):
    """open_guarded(**limits): the store on the test's file, guarded by the fake probe."""

    def opened(clock=lambda: 1.0, **limits):
        guard = Guard(probe, GuardConfig(**({"tenant_every_versions": 2} | limits)), clock)
        return open_here(guard=guard)

    return opened


@pytest.fixture
def guarded(open_guarded):
    return open_guarded()


def submit(store, window, scope, *seeds):
    for seed in seeds:
        assert store.submit(window(scope, seed))
    return store.consolidate_once()


@pytest.mark.parametrize(
    ("selected", "share"),
    [
        ({3: [[1, 0], [3, 2]], 5: [[0, 1], [2, 3]]}, 1.0),
        ({3: [[0, 9], [2, 9]], 5: [[0, 1], [2, 3]]}, 0.75),
        ({3: [[2, 3], [0, 1]], 5: [[9, 8], [9, 8]]}, 0.0),
    ],
)
def test_overlap_is_the_share_of_selections_kept_in_any_order(selected, share):
    assert routing_overlap({layer: np.array(ids) for layer, ids in selected.items()}, HOME) == share


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_loss_increase": -0.1},
        {"max_loss_increase": float("nan")},
        {"min_overlap": 1.1},
        {"tenant_every_versions": 0},
    ],
)
def test_limits_outside_their_range_are_refused(wrong):
    with pytest.raises(InvalidConfig, match=next(iter(wrong))):
        GuardConfig(**wrong)


@pytest.mark.parametrize(
    ("loss_nats", "selected_elsewhere", "passes"),
    [(2.0, 0, True), (2.01, 0, True), (2.011, 0, False), (1.5, 1, True), (1.5, 2, False), (np.nan, 0, False)],
)
def test_a_version_passes_within_both_limits_only(
    guarded, window, probe, loss_nats, selected_elsewhere, passes
):
    probe.loss_nats = loss_nats
    probe.expert_ids = {layer: ids.copy() for layer, ids in HOME.items()}
    probe.expert_ids[3][:selected_elsewhere, 0] = 9  # of 8 selections
    assert bool(submit(guarded, window, GLOBAL, 1)) is passes
    reading = guarded.canary_readings()[GLOBAL]
    assert (reading.passed, reading.version, reading.anchors_loss_nats) == (passes, 1, 2.0)
    assert reading.overlap == 1 - selected_elsewhere / 8


def test_a_global_version_that_fails_is_not_published_and_counted(guarded, window, probe, caplog):
    probe.loss_nats = 2.2
    with caplog.at_level(logging.WARNING):
        assert submit(guarded, window, GLOBAL, 1, 2) == []
    assert guarded.view(GLOBAL).version == 0
    assert guarded.versions(GLOBAL) == []
    assert guarded.counters().updates["guard_rejected"] == 2
    assert guarded.counters().updates["published"] == 0
    (line,) = [record for record in caplog.records if record.name == "keystore.canary"]
    assert (line.scope, line.version, line.loss_increase) == ("global", 1, pytest.approx(0.1))
    assert guarded.verify_audit() == 1


def test_learning_goes_on_from_the_last_good_global_version(guarded, open_at, tmp_path, window, probe):
    submit(guarded, window, GLOBAL, 1)
    probe.loss_nats = 2.2
    submit(guarded, window, GLOBAL, 2)
    probe.loss_nats = 2.0
    (published,) = submit(guarded, window, GLOBAL, 3)
    assert (published.version, published.parent) == (2, 1)
    other = open_at(tmp_path / "never-saw-the-bad-window.sqlite3")
    submit(other, window, GLOBAL, 1)
    submit(other, window, GLOBAL, 3)
    assert other.view(GLOBAL).checksum == published.checksum
    other.close()


def test_waiting_global_windows_become_one_version_with_the_keys_of_many(
    guarded, open_at, tmp_path, window, probe
):
    (published,) = submit(guarded, window, GLOBAL, 1, 2, 3)
    assert (published.version, published.parent, published.tokens) == (1, 0, 96)
    assert published.reason == "learned from 96 tokens; canary loss +0.00 %, overlap 1.000"
    assert guarded.counters().updates["published"] == 3
    assert probe.seen == [("global", 1)]
    other = open_at(tmp_path / "one-by-one.sqlite3")
    for seed in (1, 2, 3):
        submit(other, window, GLOBAL, seed)
    assert (other.view(GLOBAL).version, other.view(GLOBAL).checksum) == (3, published.checksum)
    other.close()


def test_the_global_scope_survives_a_restart(guarded, open_guarded, window):
    (published,) = submit(guarded, window, GLOBAL, 1)
    again = open_guarded()
    assert again.view(GLOBAL).checksum == published.checksum
    assert again.scopes() == [GLOBAL]


def test_the_global_scope_keeps_to_its_own_radius(open_here, window):
    store = open_here(GravityConfig(plasticity_rate=1.0))
    anchors = store.view(ScopeId("anchor"))
    for seed in range(8):
        submit(store, window, GLOBAL, seed)
        submit(store, window, TENANT, seed)
    for scope, radius in ((GLOBAL, 0.05), (TENANT, 0.2)):
        keys = store.view(scope).keys_of(3).astype(float)
        drift = np.linalg.norm(keys - anchors.keys_of(3), axis=1) / np.linalg.norm(anchors.keys_of(3), axis=1)
        assert radius / 2 < drift.max() <= radius
        check_bounds(anchors.keys_of(3), store.view(scope).keys_of(3), radius)
    assert 0.99 < max(row.drift_max for row in store.versions(GLOBAL)) <= 1.0


def test_keys_from_further_out_are_not_restored_globally(guarded, window, tmp_path):
    for seed in (1, 3, 5, 7):
        submit(guarded, window, TENANT, seed)
    guarded.snapshot(TENANT, None, tmp_path / "tenant.safetensors")
    with pytest.raises(InvalidSnapshot, match=r"0\.05"):
        guarded.restore(GLOBAL, tmp_path / "tenant.safetensors")


def test_keys_that_fail_are_not_restored_globally(guarded, window, probe, tmp_path):
    submit(guarded, window, GLOBAL, 1)
    guarded.snapshot(GLOBAL, None, tmp_path / "global.safetensors")
    guarded.reset(GLOBAL)
    probe.loss_nats = 2.2
    with pytest.raises(
        CanaryFailed, match=r"global.safetensors: canary loss \+10.00 %.*allowed: loss \+0.50 %"
    ):
        guarded.restore(GLOBAL, tmp_path / "global.safetensors")
    assert guarded.view(GLOBAL).version == 2
    probe.loss_nats = 2.0
    assert guarded.restore(GLOBAL, tmp_path / "global.safetensors") == 3


def test_a_bad_start_that_came_unjudged_is_found_when_learning_from_it_fails(
    open_here, open_guarded, window, probe
):
    submit(open_here(), window, GLOBAL, 1)  # without a guard, as by the command line
    guarded = open_guarded()
    probe.loss_nats = 2.2
    assert submit(guarded, window, GLOBAL, 2) == []
    assert guarded.view(GLOBAL).version == 2
    assert guarded.view(GLOBAL).checksum == guarded.view(ScopeId("anchor")).checksum
    assert guarded.counters().rollbacks["canary"] == 1


def test_tenants_are_judged_on_a_schedule_and_sessions_never(guarded, window, probe):
    for seed in range(4):
        submit(guarded, window, TENANT, seed)
        submit(guarded, window, SESSION, seed)
    assert probe.seen == [("tenant:default", 2), ("tenant:default", 4)]


def test_of_a_batch_the_newest_version_that_is_due_is_judged(guarded, window, probe):
    submit(guarded, window, TENANT, 1, 2, 3, 4, 5)
    assert probe.seen == [("tenant:default", 4)]


def test_a_tenant_that_fails_goes_back_to_the_newest_version_that_passed(open_guarded, window, probe, caplog):
    guarded = open_guarded()
    submit(guarded, window, TENANT, 1, 2)
    good = guarded.view(TENANT, 2).checksum
    guarded = open_guarded()  # what passed is remembered over a restart
    replaced: list[ScopeId] = []
    guarded.news.replaced.add(replaced.append)
    probe.loss_nats = 2.2
    submit(guarded, window, TENANT, 3)
    assert guarded.counters().rollbacks == {"admin": 0, "canary": 0}
    with caplog.at_level(logging.WARNING):
        submit(guarded, window, TENANT, 4)
    newest = guarded.view(TENANT)
    assert (newest.version, newest.checksum) == (5, good)
    assert newest.reason == "rollback to 2: canary loss +10.00 %, overlap 1.000 at version 4"
    assert guarded.counters().rollbacks["canary"] == 1
    assert replaced == [TENANT]
    assert "canary failed: going back to version 2" in caplog.text
    assert guarded.canary_readings()[TENANT].passed is False
    assert guarded.verify_audit() == 7  # five versions, two verdicts


def test_what_passed_is_still_there_after_long_learning(open_here, probe, window):
    config = GuardConfig(tenant_every_versions=5)
    store = open_here(guard=Guard(probe, config), versions_on_disk=4, versions_in_memory=1)
    for seed in range(5):
        submit(store, window, TENANT, seed)
    good = store.view(TENANT, 5).checksum
    probe.meanwhile = lambda: setattr(probe, "loss_nats", 2.2 if probe.seen[-1][1] == 35 else 2.0)
    store._guard.config = GuardConfig(tenant_every_versions=35)
    for seed in range(5, 34):
        submit(store, window, TENANT, seed)
    with pytest.raises(KeyVersionUnavailable):
        store.view(TENANT, 6)
    submit(store, window, TENANT, 34)
    assert (store.view(TENANT).version, store.view(TENANT).checksum) == (36, good)


def test_a_tenant_that_never_passed_goes_back_to_the_anchors(guarded, window, probe):
    probe.loss_nats = 2.2
    submit(guarded, window, TENANT, 1, 2)
    assert guarded.view(TENANT).version == 3
    assert guarded.view(TENANT).checksum == guarded.view(ScopeId("anchor")).checksum


def test_a_tenant_changed_by_hand_during_its_probe_is_left_alone(guarded, window, probe):
    submit(guarded, window, TENANT, 1)
    probe.loss_nats, probe.meanwhile = 2.2, lambda: guarded.rollback(TENANT, 1)
    submit(guarded, window, TENANT, 2)
    assert guarded.view(TENANT).reason == "rollback to 1"
    assert guarded.counters().rollbacks == {"admin": 1, "canary": 0}


def test_a_probe_keeps_nobody_from_reading_freezing_and_subscribing(guarded, window, probe):
    done: list[int] = []

    def act() -> None:
        guarded.news.published.add(lambda snapshot: None)()
        guarded.freeze(GLOBAL)
        done.append(guarded.view(GLOBAL).version)

    def in_another_thread() -> None:
        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        thread.join(30)

    probe.meanwhile = in_another_thread
    assert submit(guarded, window, GLOBAL, 1) == [], "frozen before it could be published"
    assert done == [0]
    assert guarded.counters().dropped["superseded"] == 1


def test_a_probe_that_breaks_leaves_global_windows_waiting_and_tenants_learning(guarded, window, probe):
    def broken() -> None:
        raise RuntimeError("no memory")

    probe.meanwhile = broken
    worker = ConsolidationWorker(guarded, lambda: 0.0)
    guarded.submit(window(GLOBAL, 1))
    guarded.submit(window(TENANT, 1))
    assert worker.run_once() == []
    assert guarded.degraded
    assert (guarded.view(GLOBAL).version, guarded.view(TENANT).version) == (0, 1)
    assert guarded.counters().waiting_windows == 1
    probe.meanwhile = lambda: None
    assert [each.scope for each in worker.run_once()] == [GLOBAL]
    assert not guarded.degraded


def test_without_a_guard_the_global_scope_publishes_window_by_window(open_here, window):
    store = open_here()
    assert [each.version for each in submit(store, window, GLOBAL, 1, 2)] == [1, 2]
    assert store.canary_readings() == {}


def test_a_frozen_global_scope_learns_nothing(guarded, window, probe):
    assert guarded.submit(window(GLOBAL, 1))
    guarded.freeze(GLOBAL)
    assert guarded.consolidate_once() == []
    assert probe.seen == []
    assert guarded.counters().dropped["frozen"] == 1
    guarded.unfreeze(GLOBAL)
    assert submit(guarded, window, GLOBAL, 1)


# ---- experts added while serving


def new_keys() -> dict[int, np.ndarray]:
    rng = np.random.default_rng(7)
    return {layer: rng.standard_normal((ADDED, 8), dtype=np.float32) for layer in (3, 5)}


@pytest.fixture
def settling(guarded, window):
    """The guarded store with a group in the tenant, which has learned once since."""
    guarded.experts.add("extra", TENANT, new_keys(), "cafe")
    assert guarded.submit(window(TENANT, 1, num_experts=BORN + ADDED))
    assert len(guarded.consolidate_once()) == 1
    return guarded


@pytest.mark.parametrize("scope", [GLOBAL, TENANT])
def test_a_scope_with_settling_experts_is_judged_against_the_anchors_without_them(
    guarded, window, probe, scope, tmp_path
):
    guarded.experts.add("extra", scope, new_keys(), "cafe")
    assert guarded.submit(window(scope, 1, num_experts=BORN + ADDED))
    (published,) = guarded.consolidate_once()
    assert published.visible_ids(3) is None
    assert probe.seen == [(str(scope), 2)]
    guarded.snapshot(scope, None, tmp_path / "keys.safetensors")
    if scope == GLOBAL:
        guarded.restore(GLOBAL, tmp_path / "keys.safetensors")
    assert probe.anchors_seen == [BORN]


def test_experts_that_harm_are_not_promoted(settling, probe, caplog):
    everybody, audited = settling.view(GLOBAL), settling.verify_audit()
    readings = settling.canary_readings()
    probe.promoted_loss_nats = 2.2
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CanaryFailed, match=r"experts extra: canary loss \+10\.00 %.*allowed: loss \+0\.50 %"),
    ):
        settling.experts.promote("extra")
    assert "experts extra are not promoted" in caplog.text
    assert settling.experts.all()[0].state == "settling"
    assert settling.view(GLOBAL) is everybody
    assert settling.canary_readings() == readings, "they are no scope's keys"
    assert settling.verify_audit() == audited + 1, "the verdict"
    probe.promoted_loss_nats = 2.0
    assert settling.experts.promote("extra").state == "promoted"
    assert settling.view(GLOBAL).visible_ids(3) is None


def test_what_is_promoted_is_what_was_judged_while_learning_goes_on(settling, window, probe):
    judged, moved = settling.view(TENANT).keys_of(3)[BORN:], []

    def learn() -> None:
        assert settling.submit(window(TENANT, 2, num_experts=BORN + ADDED))
        moved.extend(settling.consolidate_once())

    def in_another_thread() -> None:
        thread = threading.Thread(target=learn, daemon=True)
        thread.start()
        thread.join(30)

    probe.meanwhile = in_another_thread
    settling.experts.promote("extra")
    assert len(moved) == 1
    assert not np.array_equal(moved[0].keys_of(3)[BORN:], judged)
    for scope in (GLOBAL, TENANT):
        np.testing.assert_array_equal(settling.view(scope).keys_of(3)[BORN:], judged)


def test_a_promotion_is_refused_when_the_pool_changes_while_it_is_judged(settling, probe):
    probe.meanwhile = lambda: settling.experts.retire("extra")
    with pytest.raises(VersionConflict, match="promotion of extra"):
        settling.experts.promote("extra")
    assert settling.experts.all()[0].state == "retired"


def test_keys_read_before_the_pool_changed_are_not_restored(guarded, open_guarded, window, probe, tmp_path):
    submit(guarded, window, GLOBAL, 1)
    guarded.snapshot(GLOBAL, None, tmp_path / "keys.safetensors")
    latest = guarded.reset(GLOBAL)
    probe.meanwhile = lambda: guarded.experts.add("extra", TENANT, new_keys(), "cafe")
    with pytest.raises(VersionConflict, match="the expert pool went on to generation 1"):
        guarded.restore(GLOBAL, tmp_path / "keys.safetensors")
    assert guarded.view(GLOBAL).version == latest
    probe.meanwhile = lambda: None
    assert guarded.restore(GLOBAL, tmp_path / "keys.safetensors") == latest + 1
    assert open_guarded().view(GLOBAL).visible_ids(3).tolist() == list(range(BORN))
