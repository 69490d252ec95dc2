"""Whose scopes make room when there are too many: those of the tenant that has the most, never a smaller one's."""

from collections import deque
from collections.abc import Iterable

from keystore.records import ScopeId


def who_makes_room(by_use: Iterable[ScopeId], count: int) -> list[ScopeId]:
    """`count` of these scopes, which come in order of use: each the first of the tenant that then has the most.

    Among tenants that have equally many the one whose scope comes first makes room.
    """
    held: dict[str, deque[tuple[int, ScopeId]]] = {}
    for place, scope in enumerate(by_use):
        held.setdefault(scope.tenant, deque()).append((place, scope))
    leaving: list[ScopeId] = []
    for _ in range(count):
        largest = max(held.values(), key=lambda scopes: (len(scopes), -scopes[0][0] if scopes else 0))
        leaving.append(largest.popleft()[1])
    return leaving
