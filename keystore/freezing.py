"""Which scopes learn nothing: kept by name in the backend, read from memory."""

from collections.abc import Callable

from keystore.backends.base import EVERY_SCOPE, Backend
from keystore.records import ScopeId


class FrozenScopes:
    """`names` is swapped by reference: reading needs no lock. Changing is for one thread at a time."""

    def __init__(self, names: frozenset[str], backend: Backend, clock: Callable[[], float]) -> None:
        self.names = names
        self._backend, self._clock = backend, clock

    def has(self, scope: ScopeId | None = None) -> bool:
        """Whether a scope learns nothing, by itself, by its tenant or because everything is frozen."""
        names = self.names
        if EVERY_SCOPE in names or scope is None:
            return EVERY_SCOPE in names
        return str(scope) in names or (scope.parent is not None and str(scope.parent) in names)

    def change(self, scope: ScopeId | None, *, frozen: bool) -> None:
        """Freeze or unfreeze one scope, or all, durably."""
        self._backend.set_frozen(EVERY_SCOPE if scope is None else str(scope), frozen, self._clock())
        self.names = self._backend.frozen()
