import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keystore.errors import InvalidConfig, InvalidStatistics, NonFiniteStatistics
from keystore.records import ScopeId
from keystore.statistics import LayerStats, RoutingStats, TokenCredit, TokenTrace


@pytest.mark.parametrize(
    "text",
    ["anchor", "global", "tenant:default", "session:default/abc", "session:a/b/c", "tenant:" + "x" * 128],
)
def test_scope_names_read_back_as_written(text: str) -> None:
    assert str(ScopeId.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "tenant", "tenant:", "tenant: a", "tenant:a ", "tenant:a\n", "tenant:a\x00b", "tenant:" + "x" * 129,
     "session:a", "session:/b", "session:a/", "user:a", "anchor:x", "global:", "global:x", "Global", "tenant:a/b", "tenant:\ud800"],
)  # fmt: skip
def test_scope_names_outside_the_rules_are_refused(text: str) -> None:
    with pytest.raises(InvalidConfig):
        ScopeId.parse(text)


@given(st.text(max_size=140), st.text(max_size=140))
def test_any_accepted_scope_reads_back(tenant: str, session: str) -> None:
    try:
        scope = ScopeId("session", tenant, session)
    except InvalidConfig:
        return
    assert ScopeId.parse(str(scope)) == scope


@pytest.mark.parametrize("bad_id", [-1, 4])
def test_expert_ids_outside_the_layer_are_refused(bad_id: int) -> None:
    with pytest.raises(InvalidStatistics, match="expert ids"):
        LayerStats.from_tokens(TokenTrace(np.array([[0, bad_id]]), np.zeros((1, 3), np.float32), 4))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_queries_and_weights_that_are_not_finite_are_refused(poison: float) -> None:
    ids, queries, weights = np.array([[0, 1]]), np.ones((1, 3), np.float32), np.ones((1, 2), np.float32)
    with pytest.raises(NonFiniteStatistics):
        LayerStats.from_tokens(
            TokenTrace(ids, queries * np.float32(poison), 4, TokenCredit(ids, 0 * weights))
        )
    with pytest.raises(NonFiniteStatistics):
        LayerStats.from_tokens(
            TokenTrace(ids, 0 * queries, 4, TokenCredit(ids, weights * np.float32(poison)))
        )


def test_no_tokens_are_no_events() -> None:
    trace = TokenTrace(np.zeros((0, 2), np.int64), np.zeros((0, 3), np.float32), 4)
    assert not LayerStats.from_tokens(trace, coactivation=True).events.any()


def test_statistics_of_different_scopes_do_not_merge() -> None:
    first, second = (RoutingStats.from_tokens(ScopeId("tenant", name), {}) for name in "ab")
    with pytest.raises(InvalidStatistics):
        first.merge(second)
