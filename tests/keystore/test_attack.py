"""Somebody with one API key sends whatever moves keys most: others keep theirs, and his own stay within the radius."""

# T tokens, M = 16 experts, D = 8, K = 4 experts per token, C = 8 credit candidates

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keystore.gravity import consolidate_layer, credit_weights, initial_usage
from keystore.projection import layer_drift
from keystore.records import GravityConfig, ScopeId
from keystore.snapshot import KeySnapshot
from keystore.statistics import LayerStats, RoutingStats, TokenCredit, TokenTrace
from keystore.store import KeyStore

M, K, C, TOKENS = 16, 4, 8, 8
FAVOURED, VICTIM = 0, 1
ATTACKER, OTHER, GLOBAL = ScopeId("tenant", "mallory"), ScopeId("tenant", "alice"), ScopeId("global")
CONVERSATION = ScopeId("session", "alice", "one")
ATTACK_WINDOWS, WINDOWS_AT_ONCE = 1000, 50
RULES = ("literal", "direct", "gradient")
Open = Callable[..., KeyStore]
Teach = Callable[..., None]


def hostile_window(view: KeySnapshot, seed: int, rule: str, scope: ScopeId = ATTACKER) -> RoutingStats:
    """Queries around the victim's key, selected as served; all credit for one expert, against the victim."""
    rng, traces = np.random.default_rng(seed), dict[int, TokenTrace]()
    for layer in view.usage:
        keys = view.keys_of(layer)
        noise = rng.standard_normal((TOKENS, keys.shape[1]))
        queries = (keys[VICTIM] + keys[FAVOURED] + noise).astype(np.float32)
        found = view.search(layer, queries, C)[1]
        raw = (found == FAVOURED).astype(np.float32) - (found == VICTIM)
        credit = None if rule == "literal" else TokenCredit(found, credit_weights(raw, 3.0))
        traces[layer] = TokenTrace(np.ascontiguousarray(found[:, :K]), queries, M, credit)
    return RoutingStats.from_tokens(scope, traces, coactivation=True)


def attack(store: KeyStore, rule: str, windows: int, first_seed: int = 0) -> list[KeySnapshot]:
    """Every version that the attack published."""
    published: list[KeySnapshot] = []
    for start in range(first_seed, first_seed + windows, WINDOWS_AT_ONCE):
        for seed in range(start, start + WINDOWS_AT_ONCE):
            assert store.submit(hostile_window(store.view(ATTACKER), seed, rule))
        published += store.consolidate_once()
    return published


def bits(view: KeySnapshot) -> dict[int, bytes]:
    return {layer: keys.tobytes() for layer, keys in view.keys.items()}


@pytest.mark.parametrize("rule", ["literal", "direct"])
def test_a_thousand_attack_windows_leave_others_bit_identical_and_drift_within_the_radius(
    open_here: Open, rule: str
) -> None:
    config = GravityConfig(rule=rule, trust_radius=0.2, bonding_rate=0.05)
    store = open_here(config)
    anchors = store.view(ScopeId("anchor"))
    for seed, scope in enumerate((OTHER, CONVERSATION, GLOBAL)):
        assert store.submit(hostile_window(store.view(scope), seed, rule, scope))
        store.consolidate_once()
    before = {scope: store.view(scope) for scope in (OTHER, CONVERSATION, GLOBAL)}
    queries = np.random.default_rng(0).standard_normal((256, 8), dtype=np.float32)
    found = {scope: view.search(3, queries, K) for scope, view in before.items()}

    published = attack(store, rule, ATTACK_WINDOWS)

    for scope, view in before.items():
        now = store.view(scope)
        assert now.version == view.version
        assert bits(now) == bits(view) != bits(anchors)
        np.testing.assert_array_equal(now.search(3, queries, K), found[scope])
    assert bits(store.view(ScopeId("anchor"))) == bits(anchors)
    assert published[-1].scope == ATTACKER
    assert published[-1].tokens == ATTACK_WINDOWS * TOKENS
    worst = [
        layer_drift(anchors.keys_of(layer), view.keys_of(layer), 0.2).max
        for view in published
        for layer in view.usage
    ]
    assert 0.999 < max(worst) <= 1.0


def test_what_others_learn_meanwhile_is_what_they_would_have_learned_alone(
    open_at: Open, tmp_path_factory: pytest.TempPathFactory, teach: Teach
) -> None:
    config = GravityConfig(bonding_rate=0.0)
    stores = [open_at(tmp_path_factory.mktemp("keys") / "keys.sqlite3", config) for _ in range(2)]
    attacked, quiet = stores
    for seed in range(4):
        for store in stores:
            teach(store, seed, OTHER)
        attack(attacked, "direct", WINDOWS_AT_ONCE, first_seed=seed * WINDOWS_AT_ONCE)
    assert attacked.view(OTHER).checksum == quiet.view(OTHER).checksum
    assert quiet.view(ATTACKER).version == 0 < attacked.view(ATTACKER).version
    for store in stores:
        store.close()


def test_the_scope_of_everybody_keeps_its_own_narrower_radius_under_attack(open_here: Open) -> None:
    store = open_here(GravityConfig(trust_radius=0.2, global_trust_radius=0.05))
    for seed in range(20):
        for scope in (ATTACKER, GLOBAL):
            assert store.submit(hostile_window(store.view(scope), seed, "direct", scope))
        store.consolidate_once()
    anchors = store.view(ScopeId("anchor"))
    for scope, radius in ((ATTACKER, 0.2), (GLOBAL, 0.05)):
        drift = layer_drift(anchors.keys_of(3), store.view(scope).keys_of(3), radius)
        assert 0.999 < drift.max <= 1.0, scope


def test_without_a_radius_the_same_attack_takes_the_victims_traffic(open_here: Open) -> None:
    store = open_here(GravityConfig(trust_radius=100.0))
    anchors = store.view(ScopeId("anchor")).keys_of(3)
    rng = np.random.default_rng(1)
    near = anchors[VICTIM] + 0.3 * rng.standard_normal((200, 8)).astype(np.float32)
    wanted = near[(near @ anchors.T).argmax(axis=1) == VICTIM]
    attack(store, "direct", WINDOWS_AT_ONCE)
    assert len(wanted) > 100
    assert ((wanted @ store.view(ATTACKER).keys_of(3).T).argmax(axis=1) == FAVOURED).mean() > 0.5


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(RULES),
    st.sampled_from([0.0, 0.05, 0.2, 0.25]),
    st.sampled_from(["ema", "count", "none"]),
    st.floats(2.0**-10, 2.0**100, width=32),
)
@settings(max_examples=40, deadline=None)
def test_no_sequence_of_windows_of_any_length_of_query_leaves_the_radius(
    seed: int, rule: str, radius: float, inertia: str, length: float
) -> None:
    rng = np.random.default_rng(seed)
    config = GravityConfig(rule=rule, trust_radius=radius, inertia=inertia, bonding_rate=0.05)
    anchors = rng.standard_normal((M, 8), dtype=np.float32)
    keys, usage, learned = anchors, initial_usage(M, config), 0
    for _ in range(12):
        queries = length * rng.standard_normal((32, 8), dtype=np.float32)
        ids = np.argsort(-(queries @ keys.T), axis=1)[:, :C]
        raw = np.where(ids == FAVOURED, 1.0, -1.0).astype(np.float32) * (rng.random(ids.shape) < 0.3)
        credit = None if rule == "literal" else TokenCredit(ids, credit_weights(raw, config.credit_clamp))
        stats = LayerStats.from_tokens(TokenTrace(ids[:, :K], queries, M, credit), coactivation=True)
        update = consolidate_layer(
            anchors,
            keys,
            usage,
            stats,
            config,
            num_experts_per_tok=K,
            window_tokens=32,
            learned_tokens=learned,
        )
        keys, usage, learned = update.keys, update.usage, learned + 32
        assert layer_drift(anchors, keys, radius).max <= 1.0
    assert (keys.view(np.uint32) != anchors.view(np.uint32)).any() == (radius > 0)


def test_direct_and_gradient_credit_follow_one_law(open_at: Open, tmp_path_factory) -> None:
    checksums: list[str] = []
    for rule in ("direct", "gradient"):
        store = open_at(tmp_path_factory.mktemp("keys") / "keys.sqlite3", replace(GravityConfig(), rule=rule))
        attack(store, rule, WINDOWS_AT_ONCE)
        checksums.append(store.view(ATTACKER).checksum)
        store.close()
    assert checksums[0] == checksums[1]
