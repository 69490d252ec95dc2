"""Who worked lately, and with whom: against counting over the whole history."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.blocks import recent_routing
from model.blocks.recent_routing import RecentRouting

EXPERTS, KEPT = 5, 7


@pytest.fixture(autouse=True, scope="module")
def _few_tokens_kept():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recent_routing, "TOKENS_KEPT", KEPT)
        yield


@settings(deadline=None)
@given(st.lists(st.lists(st.permutations(range(EXPERTS)).map(lambda ids: ids[:2]), max_size=20), max_size=8))
def test_the_newest_tokens_are_counted_however_they_came(batches):
    now = 0.0
    recent = RecentRouting(EXPERTS, 2, lambda: now)
    history, selected_at = [], {}
    for batch in batches:
        now += 1
        recent.add(np.array(batch, dtype=np.int64).reshape(-1, 2), np.full(len(batch), now))
        history += batch
        selected_at |= {expert: now for row in batch for expert in row}
    newest = history[-KEPT:]
    for expert in range(EXPERTS):
        rows = [row for row in newest if expert in row]
        others = Counter(other for row in rows for other in row if other != expert)
        kept, tokens, counts = recent.together_with(expert)
        assert (kept, tokens) == (len(newest), len(rows))
        assert counts.tolist() == [others[other] for other in range(EXPERTS)]
    idle_s = [now - selected_at[expert] if expert in selected_at else None for expert in range(EXPERTS)]
    assert [None if np.isnan(each) else each for each in recent.idle_s()] == idle_s


def test_experts_that_come_and_go_leave_the_others_as_they_were():
    recent = RecentRouting(2, 2, lambda: 3.0)
    recent.resize(3)
    recent.add(np.array([[0, 2], [1, 0]]), np.array([3.0, 3.0]))
    assert recent.idle_s().tolist() == [0, 0, 0]
    assert recent.together_with(0)[2].tolist() == [0, 1, 1]
    recent.resize(2)
    assert recent.together_with(0)[2].tolist() == [0, 1]
    recent.resize(3)
    assert np.isnan(recent.idle_s()).tolist() == [False, False, True]
