import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import apsw
import numpy as np
import pytest

from keystore.backends.embedded import EmbeddedBackend
from keystore.errors import KeyVersionUnavailable, ModelMismatch, OutOfBounds, StoreCorrupted, StoreLocked
from keystore.records import GravityConfig, ScopeId
from keystore.replay import record_of

TENANT = ScopeId("tenant", "default")
REPOSITORY = Path(__file__).parents[2]


def edit(path: Path, statement: str, *bindings: object) -> None:
    connection = apsw.Connection(str(path))
    connection.execute(statement, bindings)
    connection.close()


def test_keys_of_another_model_are_never_adopted(open_here, teach) -> None:
    teach(open_here())
    with pytest.raises(ModelMismatch, match="'tiny', not of 'other'"):
        open_here(model_id="other")


def test_other_anchors_under_the_same_name_are_another_model(open_here, teach) -> None:
    store = open_here()
    teach(store)
    anchors = {layer: rows + 1 for layer, rows in store.view(TENANT, 0).keys.items()}
    with pytest.raises(ModelMismatch, match="anchors"):
        open_here(anchors=anchors)


def test_a_second_process_is_told_who_holds_the_file(path: Path, store) -> None:
    imports = "from pathlib import Path; from keystore.backends.embedded import EmbeddedBackend"
    program = f"{imports}; EmbeddedBackend(Path({str(path)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert "StoreLocked" in result.stderr
    with pytest.raises(StoreLocked, match=r"held by process \d+"):
        EmbeddedBackend(path)


@pytest.mark.parametrize("column", ["changes", "usage"])
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty"])
def test_a_corrupted_blob_names_its_scope_and_version(open_here, path, teach, column, damage) -> None:
    store = open_here()
    teach(store)
    blob = apsw.Connection(str(path)).execute(f"SELECT {column} FROM versions").get
    damaged = {
        "flip": blob[:-2] + bytes([blob[-2] ^ 1]) + blob[-1:],
        "cut": blob[:-3],
        "grow": blob + b"x",
        "empty": b"",
    }
    edit(path, f"UPDATE versions SET {column} = ?", damaged[damage])
    store = open_here()
    with pytest.raises(StoreCorrupted, match="tenant:default version 1"):
        store.view(TENANT)
    assert store.reset(TENANT) == 2, "a reset needs nothing of the damaged version"
    assert store.view(TENANT).checksum == store.view(TENANT, 0).checksum


def test_a_file_that_is_no_database_is_said_to_be_corrupted(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(StoreCorrupted):
        EmbeddedBackend(path)


def test_versions_outside_a_smaller_radius_are_not_adopted(open_here, teach) -> None:
    teach(open_here(GravityConfig(plasticity_rate=1.0)))
    store = open_here(GravityConfig(trust_radius=0.001))
    with pytest.raises(OutOfBounds, match="tenant:default version 1 layer 3"):
        store.view(TENANT)


def test_the_audit_chain_shows_an_edit(open_here, path, teach) -> None:
    store = open_here()
    for seed in range(3):
        teach(store, seed)
    store.freeze()
    assert store.verify_audit() == 4
    edit(path, "UPDATE audit SET event = replace(event, '\"tokens\":64', '\"tokens\":65') WHERE id = 2")
    with pytest.raises(StoreCorrupted, match="row 2"):
        store.verify_audit()


def test_thinning_keeps_newest_versions_and_checkpoints_loadable(open_here, teach) -> None:
    store = open_here(versions_on_disk=10, versions_in_memory=1)
    checksums = {}
    for seed in range(70):
        teach(store, seed)
        checksums[seed + 1] = store.view(TENANT).checksum
    store = open_here()
    kept = [row.version for row in store.versions(TENANT)]
    assert kept == [*range(70, 47, -1), 32, 16, 1]
    for version in kept:
        assert store.view(TENANT, version).checksum == checksums[version]
    with pytest.raises(KeyVersionUnavailable):
        store.view(TENANT, 20)
    assert store.verify_audit() == 70


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


COMMIT_LOOP = """
import sys
from pathlib import Path

import numpy as np

from keystore.backends.embedded import EmbeddedBackend
from keystore.records import GravityConfig, ScopeId
from keystore.statistics import RoutingStats, TokenTrace
from keystore.store import KeyStore

rng, scope = np.random.default_rng(), ScopeId("tenant", "default")
anchors = {0: np.random.default_rng(0).standard_normal((8, 4), dtype=np.float32)}
backend = EmbeddedBackend(Path(sys.argv[1]))
store = KeyStore("tiny", anchors, GravityConfig(), backend, num_experts_per_tok=2, plastic_layers=(0,))
print("open", store.view(scope).version, store.view(scope).checksum, store.verify_audit(), flush=True)
while True:
    queries = rng.standard_normal((4, 4), dtype=np.float32)
    trace = TokenTrace(rng.integers(0, 8, (4, 2)), queries, 8)
    store.submit(RoutingStats.from_tokens(scope, {0: trace}))
    for snapshot in store.consolidate_once():
        print("committed", snapshot.version, snapshot.checksum, flush=True)
"""


def kill_in_the_middle(path: Path, after_lines: int) -> list[list[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", COMMIT_LOOP, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as process:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(after_lines)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    return [line.split() for line in lines if line.endswith("\n")]


def survive_kills(path: Path, kills: int) -> None:
    rng, acknowledged = np.random.default_rng(0), (0, "")
    for _ in range(kills):
        lines = kill_in_the_middle(path, int(rng.integers(1, 30)))
        opened = lines[0]
        assert int(opened[1]) - acknowledged[0] in (0, 1), "at most the commit in flight is new"
        if int(opened[1]) == acknowledged[0] and acknowledged[0]:
            assert opened[2] == acknowledged[1]
        assert opened[3] == opened[1], "one audit row a version"
        acknowledged = (int(lines[-1][1]), lines[-1][2])
    assert acknowledged[0] > kills


def test_no_acknowledged_version_is_lost_in_10_kills(path: Path) -> None:
    survive_kills(path, 10)


@pytest.mark.slow
def test_no_acknowledged_version_is_lost_in_300_kills(path: Path) -> None:
    survive_kills(path, 300)
