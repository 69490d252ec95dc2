"""Kept files of experts: whole and durable, or not there."""

import os

import pytest

from model.checkpoints.experts import ExpertFile
from server.expert_files import keep

FILE = ExpertFile({}, {}, b"experts", "0" * 64)


@pytest.fixture
def synced(monkeypatch):
    """Inodes of everything that was synced."""
    inodes, sync = [], os.fsync

    def note(descriptor):
        inodes.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return inodes


def test_file_and_folders_are_synced_and_private(tmp_path, synced):
    folder = tmp_path / "data" / "experts-some"
    keep(FILE, folder)
    (kept,) = folder.iterdir()
    assert kept.read_bytes() == FILE.content
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_ino for path in (kept, folder, folder.parent, tmp_path)} <= set(synced)


def test_a_file_that_is_there_is_left_alone_and_its_folder_synced(tmp_path, synced):
    keep(FILE, tmp_path)
    (kept,) = tmp_path.iterdir()
    written = kept.stat()
    synced.clear()
    keep(FILE, tmp_path)
    assert kept.stat() == written
    assert synced == [tmp_path.stat().st_ino]


def test_nothing_stays_of_a_file_that_could_not_be_written(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        keep(FILE, tmp_path)
    assert list(tmp_path.iterdir()) == []
