"""Eight readers beside one writer: every read is whole and none goes back."""

import threading
from itertools import count

import numpy as np
import pytest

from keystore.records import ScopeId
from keystore.snapshot import KeySnapshot
from keystore.store import KeyStore

TENANT = ScopeId("tenant", "default")
READERS, VERSIONS = 8, 40
QUERY = np.ones((1, 8), np.float32)


def content(view: KeySnapshot) -> tuple[bytes, ...]:
    """Everything that routing takes from a version."""
    keys = [view.keys_of(layer).tobytes() for layer in (1, 3, 5)]
    return (*keys, view.search(3, QUERY, 4)[1].tobytes())


class Reader(threading.Thread):
    """Reads the newest version so many times, and on until the writer got somewhere."""

    def __init__(self, store: KeyStore, reads: int) -> None:
        super().__init__()
        self._store, self._reads = store, reads
        self.seen: dict[int, tuple[bytes, ...]] = {}  # by version
        self.problems: list[str] = []

    def run(self) -> None:
        newest, reads = -1, 0
        while reads < self._reads or newest < VERSIONS:
            reads += 1
            view = self._store.view(TENANT)
            if view.version < newest:
                self.problems.append(f"version {view.version} after {newest}")
            newest = view.version
            found = content(view)
            if self.seen.setdefault(newest, found) != found:
                self.problems.append(f"version {newest} changed")


@pytest.mark.parametrize("reads", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_no_read_is_torn_and_none_goes_back(open_here, window, reads) -> None:
    store = open_here(versions_on_disk=8)
    published = {0: content(store.view(TENANT))}
    store.news.published.add(lambda snapshot: published.__setitem__(snapshot.version, content(snapshot)))
    readers = [Reader(store, reads // READERS) for _ in range(READERS)]
    for reader in readers:
        reader.start()
    for seed in count():
        store.submit(window(seed=seed))
        store.consolidate_once()
        if not any(reader.is_alive() for reader in readers):
            break
    for reader in readers:
        reader.join()
        assert reader.problems == []
        assert reader.seen == {version: published[version] for version in reader.seen}
