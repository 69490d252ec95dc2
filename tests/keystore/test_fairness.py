"""Who makes room."""

from keystore.fairness import who_makes_room
from keystore.records import ScopeId


def scopes(names: str) -> list[ScopeId]:
    """ "a1 b1": session 1 of tenant a, then of b."""
    return [ScopeId("session", name[0], name[1:]) for name in names.split()]


def test_the_largest_tenants_longest_unused_goes_first() -> None:
    held = scopes("a1 b1 b2 c1 b3 c2")
    assert who_makes_room(held, 1) == scopes("b1")
    assert who_makes_room(held, 2) == scopes("b1 b2")
    assert who_makes_room(held, 6) == scopes("b1 b2 c1 a1 b3 c2")


def test_nobody_goes_when_there_is_room() -> None:
    assert who_makes_room(scopes("a1"), 0) == []
    assert who_makes_room([], 0) == []


def test_a_tenant_is_counted_with_its_sessions() -> None:
    held = [ScopeId("global"), ScopeId("tenant", "a"), *scopes("a1 b1")]
    assert who_makes_room(held, 1) == [ScopeId("tenant", "a")]
