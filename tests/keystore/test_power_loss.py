"""Power loss: a disk that forgets what was not synced, stopped at every write and sync of a scripted history.

The history runs once through a VFS that records every call. For each call the files are then laid out as such a
disk could hold them at that moment, and a store is opened on them: it must stand where the last acknowledged
change left it, or where the one in flight did.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import apsw
import numpy as np
import pytest

from keystore.records import ScopeId
from keystore.store import KeyStore

SECTOR_BYTES = 512
DATABASE = "keys-tiny.sqlite3"
TENANT, OTHER = ScopeId("tenant", "default"), ScopeId("tenant", "other")
SESSION = ScopeId("session", "default", "abc")

Images = dict[str, bytes]  # what the disk holds, by file name; a missing file has no entry
Checksums = dict[tuple[ScopeId, int], str]


class RecordedFile(apsw.VFSFile):
    """Passes everything on but syncs, and writes it down."""

    def __init__(self, name: apsw.URIFilename | str | None, flags: list[int], calls: list[tuple]) -> None:
        self.name = Path(name.filename() if isinstance(name, apsw.URIFilename) else str(name)).name
        self.calls = calls
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        self.calls.append(("write", self.name, offset, bytes(data)))
        super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:
        self.calls.append(("truncate", self.name, size))
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:
        self.calls.append(("sync", self.name))


class RecordingVFS(apsw.VFS):
    """The system's file system, recorded."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        super().__init__("recording", "")

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> RecordedFile:
        return RecordedFile(name, flags, self.calls)

    def xDelete(self, name: str, sync_folder: bool) -> None:
        self.calls.append(("delete", Path(name).name))
        super().xDelete(name, sync_folder)


@pytest.fixture
def vfs(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingVFS]:
    recording = RecordingVFS()
    monkeypatch.setattr(
        "keystore.backends.embedded.apsw.Connection", partial(apsw.Connection, vfs="recording")
    )
    monkeypatch.setattr("keystore.ledger.CHECKPOINT_EVERY", 4)  # thinning within a short history
    yield recording
    recording.unregister()


def state_of(store: KeyStore) -> tuple:
    """Everything that an acknowledged change changes."""
    heads = tuple((scope, store.view(scope).version, store.view(scope).checksum) for scope in store.scopes())
    groups = tuple((group.name, group.state) for group in store.experts.all())
    return heads, groups, store.is_frozen(OTHER), store.verify_audit()


@pytest.fixture
def history(vfs, path, open_here, clock, window, teach, tmp_path) -> SimpleNamespace:
    """`calls` to the disk, with an ("acknowledged", state) after each change; `checksums` of all versions."""
    checksums: Checksums = {}

    def opened() -> KeyStore:
        store = open_here(clock=clock, versions_on_disk=2, session_ttl_s=100)
        store.news.published.add(lambda new: checksums.__setitem__((new.scope, new.version), new.checksum))
        store._backend._writer.wal_autocheckpoint(16)  # pages: checkpoints in the middle of the history
        return store

    def acknowledge(store: KeyStore) -> None:
        vfs.calls.append(("acknowledged", state_of(store)))

    def both_tenants(store: KeyStore) -> None:
        store.submit(window(TENANT, 10))
        store.submit(window(OTHER, 11))
        assert len(store.consolidate_once()) == 2

    def expire(store: KeyStore) -> None:
        clock.now_s += 1000
        assert store.learning.expire_sessions(clock.now_s) == [SESSION]

    changes: list[Callable[[KeyStore], object]] = [
        lambda store: teach(store, 1),
        lambda store: teach(store, 2, SESSION),
        both_tenants,
        lambda store: store.freeze(OTHER),
        lambda store: store.rollback(TENANT, 1),
        lambda store: teach(store, 3),
        expire,
        lambda store: store.unfreeze(OTHER),
        lambda store: teach(store, 4),
    ]
    store = opened()
    acknowledge(store)
    for change in changes:
        change(store)
        acknowledge(store)
    store.snapshot(TENANT, None, tmp_path / "saved.safetensors")
    store = opened()  # a clean shutdown and a start in between
    acknowledge(store)
    store.restore(OTHER, tmp_path / "saved.safetensors")
    acknowledge(store)
    for seed in (5, 6, 7):
        teach(store, seed)
        acknowledge(store)
    store.close()
    return SimpleNamespace(calls=list(vfs.calls), checksums=checksums)


@pytest.fixture
def pool_history(vfs, open_here, clock, window, teach) -> SimpleNamespace:
    """As `history`, of experts that are added, settle, are promoted and retired."""
    checksums: Checksums = {}
    rng = np.random.default_rng(1)
    keys = {layer: rng.standard_normal((2, 8), dtype=np.float32) for layer in (3, 5)}

    def opened() -> KeyStore:
        store = open_here(clock=clock, versions_on_disk=2, session_ttl_s=100)
        store.news.published.add(lambda new: checksums.__setitem__((new.scope, new.version), new.checksum))
        store._backend._writer.wal_autocheckpoint(16)
        return store

    def settle(store: KeyStore, seed: int) -> None:
        store.submit(window(TENANT, seed, num_experts=18))
        assert len(store.consolidate_once()) == 1

    changes: list[Callable[[KeyStore], object]] = [
        lambda store: teach(store, 1, OTHER),
        lambda store: teach(store, 2, SESSION),
        lambda store: store.experts.add("one", TENANT, keys, "cafe"),
        lambda store: settle(store, 3),
        lambda store: teach(store, 4, OTHER),
        lambda store: store.experts.add("two", OTHER, keys, "beef"),
        lambda store: store.experts.promote("one"),
        lambda store: store.experts.retire("two"),
        lambda store: teach(store, 5, OTHER),
    ]
    store = opened()
    vfs.calls.append(("acknowledged", state_of(store)))
    for change in changes:
        change(store)
        vfs.calls.append(("acknowledged", state_of(store)))
    store.close()
    return SimpleNamespace(calls=list(vfs.calls), checksums=checksums)


def changed(content: bytes | None, call: tuple) -> bytes | None:
    """A file after one call that changes it."""
    match call:
        case ("write", _, offset, data):
            old = (content or b"").ljust(offset, b"\0")
            return old[:offset] + data + old[offset + len(data) :]
        case ("truncate", _, size):
            return (content or b"")[:size].ljust(size, b"\0")
        case ("delete", _):
            return None
    raise AssertionError(call)


def torn(call: tuple, luck: random.Random) -> list[tuple]:
    """What is left of a call that was not synced: nothing, everything, or some sectors of a write."""
    if call[0] != "write" or luck.random() < 0.5:
        return [call] if luck.random() < 0.5 else []
    _, name, offset, data = call
    starts = [0, *range(SECTOR_BYTES - offset % SECTOR_BYTES, len(data), SECTOR_BYTES), len(data)]
    sectors = [("write", name, offset + first, data[first:last]) for first, last in pairwise(starts)]
    return [sector for sector in sectors if luck.random() < 0.5]


class Disk:
    """Files as they are surely kept, and the calls that no sync has reached yet."""

    def __init__(self) -> None:
        self.kept: Images = {}
        self.pending: dict[str, list[tuple]] = {}

    def take(self, call: tuple) -> None:
        name = call[1]
        if call[0] != "sync":
            self.pending.setdefault(name, []).append(call)
            return
        if name not in self.kept:
            self._sync_folder()
        self.kept = self.after({name: self.pending.pop(name, [])})

    def _sync_folder(self) -> None:
        """SQLite syncs the folder with the first sync of a new journal or log: deletions are kept then."""
        for name, calls in self.pending.items():
            if calls[:1] == [("delete", name)]:
                self.kept = self.after({name: [calls.pop(0)]})

    def after(self, calls: dict[str, list[tuple]]) -> Images:
        images: dict[str, bytes | None] = dict(self.kept)
        for name, of_file in calls.items():
            for call in of_file:
                images[name] = changed(images.get(name), call)
        return {name: content for name, content in images.items() if content is not None}

    def torn(self, seed: int) -> Images:
        luck = random.Random(seed)
        return self.after(
            {
                name: [part for call in calls for part in torn(call, luck)]
                for name, calls in self.pending.items()
            }
        )


def crash_points(calls: list[tuple], seeds: int) -> Iterator[tuple[int, Images, tuple[object, object]]]:
    """For every call: the disk's contents if the power fails at it, and the two states allowed then.

    First with everything unsynced gone, then torn in `seeds` ways, the call itself included.
    """
    acknowledged = [call[1] for call in calls if call[0] == "acknowledged"]
    disk, reached = Disk(), 0
    for index, call in enumerate(calls):
        if call[0] == "acknowledged":
            reached += 1
            continue
        allowed = acknowledged[max(reached - 1, 0)], acknowledged[min(reached, len(acknowledged) - 1)]
        yield index, disk.kept, allowed
        if call[0] == "sync":
            for seed in range(seeds):
                yield index, disk.torn(index * 1000 + seed), allowed
        disk.take(call)
        if call[0] != "sync":
            for seed in range(seeds):
                yield index, disk.torn(index * 1000 + seed), allowed
    yield len(calls), disk.kept, (acknowledged[-1], acknowledged[-1])


def survive(history: SimpleNamespace, folder: Path, open_at: Callable, teach: Callable, seeds: int) -> int:
    """Open a store at every crash point; returns how many different ones there were."""
    seen = set()
    for index, images, allowed in crash_points(history.calls, seeds):
        key = hash((tuple(sorted(images.items())), allowed))
        if key in seen:
            continue
        seen.add(key)
        for old in folder.iterdir():
            old.unlink()
        for name, content in images.items():
            (folder / name).write_bytes(content)
        store = open_at(folder / DATABASE, versions_on_disk=2, session_ttl_s=100)
        try:
            assert state_of(store) in allowed, f"power lost at call {index}: {history.calls[index][:2]}"
            for scope in store.scopes():
                for row in store.versions(scope):
                    found = store.view(scope, row.version)
                    assert row.checksum == history.checksums[scope, row.version]
                    if row.generation == found.generation:  # an older one was verified and lifted
                        assert found.checksum == row.checksum
            if index % 16 == 0:
                teach(store, 99)
        finally:
            store.close()
    return len(seen)


def test_nothing_acknowledged_is_lost_at_any_write_or_sync(history, tmp_path, open_at, teach) -> None:
    (tmp_path / "after").mkdir()
    assert survive(history, tmp_path / "after", open_at, teach, seeds=1) > 150


def test_a_change_of_the_expert_pool_is_there_with_its_versions_or_not_at_all(
    pool_history, tmp_path, open_at, teach
) -> None:
    def teach_somebody_else(store: KeyStore, seed: int) -> None:
        teach(store, seed, ScopeId("tenant", "third"))

    (tmp_path / "after").mkdir()
    assert survive(pool_history, tmp_path / "after", open_at, teach_somebody_else, seeds=1) > 100


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_however_writes_are_torn(history, tmp_path, open_at, teach) -> None:
    (tmp_path / "after").mkdir()
    assert survive(history, tmp_path / "after", open_at, teach, seeds=10) > 1000


def test_a_disk_that_lies_about_syncs_is_found_out(history, tmp_path, open_at, teach) -> None:
    (tmp_path / "after").mkdir()
    first_state = next(i for i, call in enumerate(history.calls) if call[0] == "acknowledged")
    honest, later = history.calls[:first_state], history.calls[first_state:]
    history.calls = honest + [call for call in later if call[0] != "sync"]
    with pytest.raises(AssertionError, match="power lost at call"):
        survive(history, tmp_path / "after", open_at, teach, seeds=0)
