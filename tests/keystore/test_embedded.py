import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import apsw
import pytest

from keystore.backends.embedded import EmbeddedBackend
from keystore.errors import StoreCorrupted, StoreLocked
from keystore.records import ScopeId
from keystore.replay import record_of

TENANT = ScopeId("tenant", "default")
REPOSITORY = Path(__file__).parents[2]


def edit(path: Path, statement: str, *bindings: object) -> None:
    connection = apsw.Connection(str(path))
    connection.execute(statement, bindings)
    connection.close()


def test_a_second_process_is_told_who_holds_the_file(path: Path, store) -> None:
    imports = "from pathlib import Path; from keystore.backends.embedded import EmbeddedBackend"
    program = f"{imports}; EmbeddedBackend(Path({str(path)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert "StoreLocked" in result.stderr
    with pytest.raises(StoreLocked, match=r"held by process \d+"):
        EmbeddedBackend(path)


def test_a_file_that_is_no_database_is_said_to_be_corrupted(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(StoreCorrupted):
        EmbeddedBackend(path)


def test_the_audit_chain_shows_an_edit(open_here, path, teach) -> None:
    store = open_here()
    for seed in range(3):
        teach(store, seed)
    store.freeze()
    assert store.verify_audit() == 4
    edit(path, "UPDATE audit SET event = replace(event, '\"tokens\":64', '\"tokens\":65') WHERE id = 2")
    with pytest.raises(StoreCorrupted, match="row 2"):
        store.verify_audit()


def test_a_start_after_thousands_of_versions_reads_heads_and_one_checkpoint(
    open_here, teach, path, monkeypatch
) -> None:
    store = open_here()
    teach(store)
    first = store.view(TENANT)
    later = [replace(first, version=number, parent=number - 1) for number in range(2, 4001)]
    store._backend.commit(
        [record_of(new, first, store._ledger.pool, 0.2, is_checkpoint=new.version % 16 == 0) for new in later]
    )
    loaded = []
    load = EmbeddedBackend.load
    monkeypatch.setattr(
        EmbeddedBackend, "load", lambda self, *which: loaded.append(load(self, *which)) or loaded[-1]
    )
    store = open_here()
    assert loaded == [], "no version is read before it is asked for"
    assert store.view(TENANT).version == 4000
    assert store.view(TENANT, 3999).checksum == first.checksum
    assert [len(stored.changes) for stored in loaded] == [1, 16], "a checkpoint and what follows it"
    connection = apsw.Connection(str(path))
    plan = connection.execute("EXPLAIN QUERY PLAN SELECT max(version) FROM versions WHERE scope = ?", ("x",))
    assert "USING COVERING INDEX one_version_once" in str(plan.fetchall())
    connection.close()
