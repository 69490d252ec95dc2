"""Snapshot files: what is written comes back bit for bit, and nothing that was tampered with is believed."""

import json
import os
import stat
from dataclasses import asdict

import numpy as np
import pytest
from safetensors import safe_open

from keystore.errors import InvalidSnapshot, ModelMismatch, SnapshotExists, VersionConflict
from keystore.records import GravityConfig, ScopeId

TENANT, OTHER = ScopeId("tenant", "default"), ScopeId("tenant", "other")
SESSION = ScopeId("session", "default", "abc")


def split(data: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.fixture
def exported(store, teach, tmp_path):
    """A file of version 2 and the store that wrote it."""
    teach(store, 1)
    teach(store, 2)
    store.snapshot(TENANT, None, tmp_path / "two.safetensors")
    return tmp_path / "two.safetensors"


def test_a_file_is_plain_safetensors_with_everything_about_the_version(store, exported) -> None:
    view = store.view(TENANT)
    with safe_open(exported, "np") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {f"layers.{n}.keys" for n in (1, 3, 5)} | {
            f"layers.{n}.usage" for n in (3, 5)
        }
        for layer in (1, 3, 5):
            np.testing.assert_array_equal(file.get_tensor(f"layers.{layer}.keys"), view.keys_of(layer))
    row = store.versions(TENANT)[0]
    assert metadata["model_id"] == "tiny"
    assert metadata["scope"] == "tenant:default"
    assert [metadata[name] for name in ("version", "parent", "tokens")] == ["2", "1", "64"]
    assert metadata["drift_max"] == str(row.drift_max)
    assert metadata["checksum"] == view.checksum
    assert json.loads(metadata["gravity"]) == asdict(GravityConfig())


def test_a_file_appears_whole_for_its_owner_only_and_replaces_nothing(store, exported) -> None:
    assert stat.S_IMODE(exported.stat().st_mode) == 0o600
    before = exported.read_bytes()
    with pytest.raises(SnapshotExists, match=r"two\.safetensors"):
        store.snapshot(TENANT, 1, exported)
    assert exported.read_bytes() == before
    assert list(exported.parent.glob("*.partial")) == list(exported.parent.glob(".*.partial")) == []


def test_a_version_comes_back_as_a_new_one_with_its_usage(store, teach, exported) -> None:
    wanted = store.view(TENANT)
    teach(store, 3)
    assert store.restore(TENANT, exported, if_version=3) == 4
    now = store.view(TENANT)
    assert (now.version, now.parent, now.tokens) == (4, 3, 64)
    assert now.reason == "restore of two.safetensors, there version 2"
    assert now.checksum == wanted.checksum
    assert now.keys_of(1) is store.view(TENANT, 0).keys_of(1), "a layer that never moves shares its memory"
    for layer in (3, 5):
        np.testing.assert_array_equal(now.keys_of(layer), wanted.keys_of(layer))
        np.testing.assert_array_equal(now.usage[layer], wanted.usage[layer])


def test_a_restore_is_in_the_audit_chain_and_survives_a_restart(open_here, store, exported, path) -> None:
    checksum = store.view(TENANT).checksum
    store.restore(OTHER, exported)
    store.restore(SESSION, exported)
    store = open_here()
    assert store.verify_audit() == 4
    for scope in (OTHER, SESSION):
        assert store.view(scope).checksum == checksum
        assert store.versions(scope)[0].reason.startswith("restore of two.safetensors")


def test_learning_goes_on_from_a_restore_as_it_did_from_the_original(open_here, teach, exported) -> None:
    store = open_here()
    store.restore(OTHER, exported)
    teach(store, 9, OTHER)
    teach(store, 9, TENANT)
    assert store.view(OTHER).checksum == store.view(TENANT).checksum


def test_the_anchors_can_be_written_too(store, tmp_path) -> None:
    store.snapshot(OTHER, 0, tmp_path / "anchors.safetensors")
    store.restore(OTHER, tmp_path / "anchors.safetensors")
    assert store.view(OTHER).checksum == store.view(OTHER, 0).checksum


def test_a_restore_on_another_version_than_expected_changes_nothing(store, exported) -> None:
    with pytest.raises(VersionConflict):
        store.restore(TENANT, exported, if_version=1)
    assert store.view(TENANT).version == 2


def test_waiting_windows_are_dropped_by_a_restore(store, window, exported) -> None:
    store.submit(window())
    store.restore(TENANT, exported)
    assert store.consolidate_once() == []
    assert store.counters().dropped["superseded"] == 1


def test_keys_of_other_weights_are_refused(open_here, exported, tmp_path) -> None:
    anchors = {layer: rows + 1 for layer, rows in open_here().view(TENANT, 0).keys.items()}
    (tmp_path / "keys-tiny.sqlite3").unlink()
    for other in ({"model_id": "other"}, {"anchors": anchors}):
        with pytest.raises(ModelMismatch, match=r"two\.safetensors"):
            open_here(**other).restore(TENANT, exported)
        (tmp_path / "keys-tiny.sqlite3").unlink()


def test_keys_past_the_trust_radius_of_this_store_are_refused(open_here, exported) -> None:
    store = open_here(GravityConfig(trust_radius=1e-4))
    with pytest.raises(InvalidSnapshot, match=r"two\.safetensors: tensor layers\.3\.keys: .*from home"):
        store.restore(OTHER, exported)


def test_usage_measured_otherwise_is_refused(open_here, exported, tmp_path) -> None:
    (tmp_path / "keys-tiny.sqlite3").unlink()
    store = open_here(GravityConfig(inertia="count"))
    with pytest.raises(InvalidSnapshot, match="inertia 'ema'"):
        store.restore(TENANT, exported)


def test_moved_keys_of_a_layer_that_is_not_plastic_here_are_refused(open_here, exported, tmp_path) -> None:
    (tmp_path / "keys-tiny.sqlite3").unlink()
    with pytest.raises(InvalidSnapshot, match=r"layers\.5"):
        open_here(plastic_layers=(3,)).restore(TENANT, exported)


def changed(header: dict, tensor: str, **entry: object) -> dict:
    return header | {tensor: header[tensor] | entry}


def without(header: dict, *names: str) -> dict:
    return {name: value for name, value in header.items() if name not in names}


KEYS = "layers.3.keys"
HEADERS = {
    "a tensor is missing": (lambda h: without(h, KEYS), "layers.3.keys is missing"),
    "a tensor is new": (lambda h: h | {"layers.9.keys": h[KEYS]}, r"layers\.9\.keys' has no place"),
    "float64": (lambda h: changed(h, KEYS, dtype="F64"), r"layers\.3\.keys is F64"),
    "transposed": (lambda h: changed(h, KEYS, shape=[8, 16]), r"layers\.3\.keys is F32 \[8, 16\]"),
    "a huge shape": (lambda h: changed(h, KEYS, shape=[2**62, 2**62]), "allowed"),
    "a shape of words": (lambda h: changed(h, KEYS, shape="all"), "allowed"),
    "offsets overlap": (lambda h: changed(h, KEYS, data_offsets=[0, 512]), "starts at byte"),
    "offsets negative": (lambda h: changed(h, KEYS, data_offsets=[-512, 0]), r"layers\.3\.keys takes bytes"),
    "offsets beyond": (lambda h: changed(h, KEYS, data_offsets=[2**40, 2**40 + 512]), "starts at byte"),
    "offsets reversed": (lambda h: changed(h, KEYS, data_offsets=[512, 0]), r"layers\.3\.keys takes bytes"),
    "offsets are not whole": (lambda h: changed(h, KEYS, data_offsets=[0.0, 512.0]), "not two whole numbers"),
    "offsets are truths": (lambda h: changed(h, KEYS, data_offsets=[False, True]), "not two whole numbers"),
    "an entry is a list": (lambda h: h | {KEYS: []}, "not described"),
    "no metadata": (lambda h: without(h, "__metadata__"), "format 'unknown'"),
    "metadata of numbers": (lambda h: h | {"__metadata__": {"version": 2}}, "object of strings"),
    "another format": (lambda h: changed(h, "__metadata__", format="libration-keys-9"), "libration-keys-9"),
    "another checksum": (lambda h: changed(h, "__metadata__", checksum="0" * 64), "checksum '0000"),
    "a version in words": (lambda h: changed(h, "__metadata__", version="two"), "version is 'two'"),
    "a huge version": (lambda h: changed(h, "__metadata__", version="9" * 4000), "version is '999"),
    "negative tokens": (lambda h: changed(h, "__metadata__", tokens="-1"), "tokens is '-1'"),
    "gravity is no JSON": (lambda h: changed(h, "__metadata__", gravity="[" * 9999), "inertia None"),
    "a list": (lambda h: [], "no JSON object"),
    "no JSON": (lambda h: b"{]", "no JSON"),
    "no UTF-8": (lambda h: b'{"\xff": 1}', "no JSON"),
    "nested": (lambda h: b"[" * 100_000, "no JSON"),
    "a name twice": (lambda h: b'{"a": 1, "a": 2}', "a name comes twice"),
}  # fmt: skip


@pytest.mark.parametrize("damage", HEADERS)
def test_a_header_that_does_not_fit_is_named_and_changes_nothing(store, exported, damage) -> None:
    spoil, message = HEADERS[damage]
    header, body = split(exported.read_bytes())
    exported.write_bytes(join(spoil(header), body))
    with pytest.raises(InvalidSnapshot, match=message) as caught:
        store.restore(TENANT, exported)
    assert str(caught.value).startswith("two.safetensors")
    assert store.view(TENANT).version == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_values_that_do_not_belong_are_refused_even_with_a_right_checksum(store, exported, value) -> None:
    from keystore.snapshot import checksum_of

    view = store.view(TENANT)
    for tensor, index in (("layers.3.keys", 3), ("layers.5.usage", 5)):
        header, body = split(exported.read_bytes())
        start = header[tensor]["data_offsets"][0]
        wrong = np.float32(-value if "usage" in tensor else value).tobytes()
        keys, usage = dict(view.keys), dict(view.usage)
        part = keys if "keys" in tensor else usage
        part[index] = part[index].copy()
        part[index].flat[0] = np.frombuffer(wrong, np.float32)[0]
        header["__metadata__"]["checksum"] = checksum_of(keys, usage)
        exported.write_bytes(join(header, body[:start] + wrong + body[start + 4 :]))
        with pytest.raises(InvalidSnapshot, match=tensor.replace(".", r"\.")):
            store.restore(TENANT, exported)
        exported.write_bytes(join(*split(join(header, body))))


@pytest.mark.parametrize("keep", [0, 7, 8, 9, 100, -512, -1])
def test_a_file_cut_short_is_refused(store, exported, keep) -> None:
    exported.write_bytes(exported.read_bytes()[:keep])
    with pytest.raises(InvalidSnapshot, match="two"):
        store.restore(TENANT, exported)


@pytest.mark.parametrize("size", [2**63, 2**20 + 1, 0])
def test_the_header_is_bounded_before_it_is_read(store, exported, size) -> None:
    exported.write_bytes(size.to_bytes(8, "little") + exported.read_bytes()[8:])
    with pytest.raises(InvalidSnapshot, match="header of"):
        store.restore(TENANT, exported)


def test_a_longer_file_is_refused(store, exported) -> None:
    exported.write_bytes(exported.read_bytes() + b"\0")
    with pytest.raises(InvalidSnapshot, match="bytes of tensors"):
        store.restore(TENANT, exported)


def test_every_single_flipped_byte_is_noticed(store, exported) -> None:
    data = exported.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    for at in [*range(8), *range(header_end, len(data), 97)]:
        exported.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        with pytest.raises(InvalidSnapshot):
            store.restore(TENANT, exported)


def test_what_is_no_regular_file_is_refused_without_waiting(store, tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises((InvalidSnapshot, OSError)):
            store.restore(TENANT, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        store.restore(TENANT, tmp_path / "nothing")
