"""What is compiled ahead: kept beside the sources, found again, and done without where nothing can be kept."""

import importlib.util
import logging

import numpy as np
import pytest
from numba.core import config

from model.native import compiled

SOURCE = """
from numba import njit

@njit
def double(values):
    values *= 2
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Compiles as a start does, a function that this process has not seen; whether nothing had to be compiled."""
    for name in ("CACHE_DIR", "CACHE_LOCATOR_CLASSES"):
        monkeypatch.setattr(config, name, getattr(config, name))
    monkeypatch.setattr(compiled, "kept_folder", lambda: tmp_path / "kept" / "native")
    path = tmp_path / "doubling.py"
    path.write_text(SOURCE)

    def started():
        spec = importlib.util.spec_from_file_location("doubling", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(compiled, "ENTRIES", {module.double: "float32[::1]"})
        known = compiled.compile_native()
        values = np.ones(3, np.float32)
        module.double(values)
        assert values.tolist() == [2, 2, 2]
        return known

    return started


def test_what_one_start_compiles_the_next_one_finds(start, tmp_path, caplog):
    assert not start()
    assert (tmp_path / "kept" / "native").is_dir()
    assert start()
    assert not caplog.records


def test_what_cannot_be_kept_is_compiled_in_memory_and_the_log_says_so(start, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "writable", lambda folder: False)
    with caplog.at_level(logging.WARNING):
        assert not start()
        assert not start()
    assert not (tmp_path / "kept").exists()
    assert [str(tmp_path / "kept") in record.getMessage() for record in caplog.records] == [True, True]


def test_what_was_kept_is_found_where_nothing_can_be_written_any_more(start, monkeypatch, caplog):
    assert not start()
    monkeypatch.setattr(compiled, "writable", lambda folder: False)
    assert start()
    assert not caplog.records


def test_a_folder_is_writable_where_the_nearest_above_it_is(tmp_path):
    assert compiled.writable(tmp_path / "kept" / "native")
