"""The pool of keys and values: parts never overlap, whatever comes and goes, and start out as zeros."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.graphs.kv_pool import FIRST_BLOCK, PooledBudget
from model.kv_cache import POSITION_BLOCK

BLOCKS = 12


@pytest.fixture(scope="session")
def tiny_config(make_tiny):
    return make_tiny(torch.float32).model.config


def budget_of(tiny_config):
    return PooledBudget(tiny_config, BLOCKS * POSITION_BLOCK, torch.float32, torch.device("cpu"))


def blocks_of(cache):
    return set(range(cache.first, cache.first + cache.capacity // POSITION_BLOCK))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 5 * POSITION_BLOCK), st.integers(-20, -1)), max_size=40))
def test_whoever_fits_gets_a_part_of_its_own_and_all_of_it_comes_back(tiny_config, actions):
    budget, held = budget_of(tiny_config), []
    for action in actions:
        taken = set().union(*(blocks_of(cache) for cache in held))
        if action < 0:
            if held:
                budget.release(held.pop(action % len(held)))
            continue
        wanted = budget.rounded(action) // POSITION_BLOCK
        room = any(
            not taken & set(range(at, at + wanted))
            for at in range(FIRST_BLOCK, FIRST_BLOCK + BLOCKS - wanted + 1)
        )
        assert budget.fits(action) == room
        if room:
            cache = budget.reserve(action)
            assert cache.capacity == wanted * POSITION_BLOCK
            assert not cache.keys.any()
            assert not cache.values.any()
            cache.keys.fill_(len(held) + 1.0)
            cache.values.fill_(torch.nan)
            assert not blocks_of(cache) & taken
            assert min(blocks_of(cache)) >= FIRST_BLOCK
            held.append(cache)
            assert budget.reserved_tokens == (len(taken) + wanted) * POSITION_BLOCK
    for cache in held:
        budget.release(cache)
    assert budget.reserved_tokens == 0
    assert budget.fits(BLOCKS * POSITION_BLOCK)


def test_a_cache_is_a_view_of_the_pool(tiny_config):
    budget = budget_of(tiny_config)
    budget.reserve(POSITION_BLOCK)
    cache = budget.reserve(2 * POSITION_BLOCK)
    assert cache.keys.shape == (3, 2, 2 * POSITION_BLOCK, 8)
    cache.keys[1, :, POSITION_BLOCK + 5] = 7.0
    assert (budget.keys[1, cache.first + 1, 5] == 7.0).all()
    assert int(budget.keys.count_nonzero()) == 2 * 8
