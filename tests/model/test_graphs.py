"""Written rows as recorded calls against the model's ordinary way. On a CPU, and on a GPU by `make test-gpu`."""

import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from model.blocks.base import RoutingTrace
from model.checkpoints.load import assemble
from model.graphs import decoder
from model.graphs.blocks import GraphVariant
from model.graphs.decoder import GraphDecoder
from model.graphs.device import Recorder
from model.graphs.way import IN_TORCH, way_on
from model.keys import AnchorKeys

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COVERED = ("some", "moe")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}

pytestmark = pytest.mark.parametrize("device", PLACES)


class Recording(TorchDispatchMode):
    """Takes down every operation, with the very tensors that it read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def replay(self):
        """As a CUDA graph does: no Python, the same addresses."""
        for operation, args, kwargs, result in self.operations:
            again = operation(*args, **kwargs)
            for known, new in zip(tensors(result), tensors(again), strict=True):
                if known.data_ptr() != new.data_ptr():
                    known.copy_(new)


def tensors(result):
    return [t for t in (result if isinstance(result, tuple | list) else [result]) if torch.is_tensor(t)]


# What depends on values: its result's shape, or a number that the host reads.
LOOKS = (
    "item",
    "_local_scalar_dense",
    "nonzero",
    "bincount",
    "unique",
    "masked_select",
    "equal",
    "lift_fresh",
)


@pytest.fixture
def captured(device, monkeypatch):
    """Every call that is recorded. On a CPU it is replayed operation by operation, as a GPU would."""
    calls = []
    real = Recorder.capture

    def capture(recorder, call):
        calls.append(call)
        if device == "cuda":
            return real(recorder, call)
        recording = Recording()
        with recording:
            call()
        names = {str(operation).split(".")[1] for operation, *_ in recording.operations}
        assert not names & set(LOOKS), names & set(LOOKS)
        return recording.replay

    monkeypatch.setattr(Recorder, "capture", capture)
    return calls


@dataclass
class Stream:
    """A text that is being written, in memory of its own, for each of the two ways."""

    tokens: list
    variant: object = None
    keys: object = None
    ordinary: object = None
    recorded: object = None
    rows: list = field(default_factory=list)

    def segment(self, cache, **given):
        segment = decoder.Segment(self.tokens[-1:], len(self.tokens) - 1, cache, decode=True)
        return replace(segment, variant=self.variant, keys=self.keys, **given)


@dataclass
class Pair:
    """One model, and both ways through it for the same streams."""

    model: object
    graphs: GraphDecoder
    budget: object
    tinies: dict
    usage: dict = field(default_factory=dict)

    def stream(self, kind, tokens, keys=None, room=128):
        tiny = self.tinies.get(kind)
        stream = Stream(list(tokens), tiny and tiny.variant, keys or (tiny and tiny.keys))
        stream.ordinary, stream.recorded = self.plain.reserve(room), self.budget.reserve(room)
        for cache in (stream.ordinary, stream.recorded):
            prompt = replace(stream.segment(cache), token_ids=stream.tokens[:-1], start=0, decode=False)
            self.model.step([prompt])
        return stream

    def step(self, streams, **given):
        """One token of each, both ways; returns rows of the ordinary and of the recorded one."""
        streams = sorted(streams, key=lambda s: id(s.variant))
        before = self.counts()
        expected = self.model._read([s.segment(s.ordinary, **given) for s in streams])
        ordinary = self.counts() - before
        rows = self.model.step([s.segment(s.recorded, **given) for s in streams])
        self.model.settle()
        difference = self.counts() - before - 2 * ordinary
        # bfloat16 rounds either way's numbers differently, and of experts that are almost equally good takes another.
        assert not (difference if self.model.dtype == torch.float32 else difference.sum()).any()
        for stream, row in zip(streams, rows, strict=True):
            stream.tokens.append(int(row[:50].sum().abs() * 1000) % 97)
        return expected, rows

    def counts(self):
        return np.concatenate([tiny.variant.usage.counts.ravel() for tiny in self.tinies.values()])

    @property
    def plain(self):
        from model.kv_cache import CacheBudget

        return CacheBudget(self.model.config, 1 << 16, self.model.dtype, self.model.device)


@pytest.fixture
def pair(device, captured, make_tiny, random_weights):
    """pair(dtype): the tiny base with recorded calls, and every variant's blocks."""

    def make(dtype=torch.float32, **sizes):
        kinds = (*COVERED, "mom", "fm-moe", "ffn")
        tinies = {kind: make_tiny(dtype, kind, **sizes) for kind in kinds}
        config = tinies["some"].model.config
        model = assemble(config, {n: w.to(device) for n, w in random_weights(config, dtype).items()})
        for tiny in tinies.values():
            for block in tiny.blocks.values():
                block.to(device)
        model.graphs = GraphDecoder(model)
        return Pair(model, model.graphs, model.cache_budget(1 << 14), tinies)

    return make


def moved(keys, seed):
    """A later version of the keys."""
    generator = np.random.default_rng(seed)
    later = {
        layer: keys.keys_of(layer) + generator.normal(size=keys.keys_of(layer).shape, scale=0.5).astype("f4")
        for layer in (1, 2)
    }
    return AnchorKeys(later)


def text(start, length):
    return [(start + 3 * i) % 97 for i in range(length)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", [None, *COVERED])
def test_recorded_rows_are_those_of_the_ordinary_way(pair, kind, dtype):
    both = pair(dtype)
    streams = [both.stream(kind, text(i, 5 + 7 * i)) for i in range(5)]
    earlier, close = [], []
    for _ in range(12):
        expected, rows = both.step(streams)
        close += torch.isclose(rows, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]).all(1).tolist()
        earlier.append((rows, rows.clone()))
    assert sum(close) >= (0.8 if kind and dtype == torch.bfloat16 else 1) * len(close)
    assert all(torch.equal(rows, kept) for rows, kept in earlier)


def test_variants_scopes_and_versions_share_one_call(pair, captured):
    both = pair()
    keys = both.tinies["some"].keys
    kinds = [(None, None), ("some", keys), ("some", moved(keys, 1)), ("some", moved(keys, 2)), ("moe", None)]
    streams = [both.stream(kind, text(i, 9 + i), view) for i, (kind, view) in enumerate(kinds)]
    for _ in range(6):
        expected, rows = both.step(streams)
        assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    assert len(captured) == 1
    alone = [both.stream("some", text(7, 9), view) for view in (keys, streams[2].keys)]
    _, rows = both.step(alone)
    assert not torch.allclose(*rows, atol=1e-3)  # versions make a difference


def test_streams_join_and_leave_and_their_memory_goes_to_others(pair):
    both = pair()
    keys = both.tinies["some"].keys
    streams = [both.stream("some", text(i, 4 + i), moved(keys, i)) for i in range(3)]
    for step in range(30):
        if step % 3 == 2:
            gone = streams.pop(step % len(streams))
            gone.recorded.keys[:, :, len(gone.tokens) :] = torch.nan  # whatever a former owner left
            both.budget.release(gone.recorded)
        if step % 2 == 0:
            kind = ("some", "moe", None)[step % 3]
            streams.append(both.stream(kind, text(step, 3 + 5 * step), room=192 + 64 * (step % 3)))
        expected, rows = both.step(streams)
        assert_close(rows, expected, atol=1e-4, rtol=1e-4)


def test_a_new_version_is_copied_in_and_nothing_is_recorded_anew(pair, captured):
    both = pair()
    keys = both.tinies["some"].keys
    stream = both.stream("some", text(1, 9))
    for version in range(6):
        stream.keys = moved(keys, version)
        expected, rows = both.step([stream])
        assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    assert len(captured) == 1


def test_versions_that_nobody_sees_make_room_for_others(pair, monkeypatch, captured):
    monkeypatch.setattr(decoder, "MAX_ROWS", 4)
    both = pair()
    keys = both.tinies["some"].keys
    kept = both.stream("some", text(1, 9), moved(keys, 0))
    for version in range(1, 12, 3):
        others = [both.stream("some", text(version, 5), moved(keys, version + i)) for i in range(3)]
        expected, rows = both.step([kept, *others])
        assert_close(rows, expected, atol=1e-4, rtol=1e-4)
        for other in others:
            both.budget.release(other.recorded)
    assert len(captured) == 1


def test_more_rows_than_a_call_takes_go_in_several(pair, monkeypatch):
    monkeypatch.setattr(decoder, "MAX_ROWS", 4)
    both = pair()
    streams = [both.stream(("some", "moe")[i % 2], text(i, 5 + i)) for i in range(11)]
    expected, rows = both.step(streams)
    assert_close(rows, expected, atol=1e-4, rtol=1e-4)


def test_a_text_that_outgrows_a_recording_gets_a_longer_one(pair, captured):
    both = pair(max_position_embeddings=1024)
    stream = both.stream("moe", text(1, 250), room=300)
    for _ in range(12):
        expected, rows = both.step([stream])
        assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    assert len(captured) == 2


def test_recordings_that_were_unused_longest_make_room_for_others(pair, captured, monkeypatch):
    monkeypatch.setattr(decoder, "MOST_RECORDINGS", 2)
    both = pair()
    kinds = (None, "moe", None, "some", None, "moe")
    streams = {kind: both.stream(kind, text(1, 9)) for kind in kinds}
    for kind in kinds:
        expected, rows = both.step([streams[kind]])
        assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    assert len(captured) == 4  # of `moe` twice


def test_experts_that_are_added_and_hidden_are_recorded_anew(pair, captured):
    class Shown(AnchorKeys):
        def visible_ids(self, layer):
            return np.array([0, 2, 3, 9])

        def search(self, layer, queries, k):
            scores = np.full((len(queries), 10), -np.inf, dtype="f4")
            scores[:, self.visible_ids(layer)] = (queries @ self.keys_of(layer).T)[:, self.visible_ids(layer)]
            ids = np.argsort(-scores, axis=1)[:, :k]
            return np.take_along_axis(scores, ids, axis=1), ids

    both = pair()
    tiny, old = both.tinies["some"], both.tinies["some"].keys
    streams = [both.stream("some", text(1, 9)), both.stream("some", text(3, 9))]
    both.step(streams)
    for block in tiny.blocks.values():
        block.experts.append({name: 3 * p[:2].clone() for name, p in block.experts.stacked.items()})
    tiny.variant.usage.resize({1: 10, 2: 10})
    streams[1].keys = Shown(
        {layer: np.concatenate([old.keys_of(layer), 2 * old.keys_of(layer)[:2]]) for layer in (1, 2)}
    )
    for _ in range(4):
        expected, rows = both.step(streams)  # the first stream's version has no keys of the new experts
        assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    assert len(captured) == 2


def test_rows_that_do_not_fit_go_the_ordinary_way_in_their_places(pair, captured):
    both = pair()
    streams = [both.stream(k, text(i, 9 + i)) for i, k in enumerate(("mom", "some", "fm-moe", None, "ffn"))]
    stranger = both.stream("moe", text(6, 8))
    stranger.recorded = both.plain.reserve(128)
    both.model.step(
        [replace(stranger.segment(stranger.recorded), token_ids=stranger.tokens[:-1], start=0, decode=False)]
    )
    taught = both.stream("some", text(7, 8))
    expected, rows = both.step([*streams, stranger])
    assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    calls = len(captured)
    trace, offsets = RoutingTrace(frozenset({2})), {2: torch.ones(8, 32, device=both.model.device)}
    for given in ({"trace": trace}, {"offsets": offsets}):
        expected, rows = both.step([taught], **given)
        assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    assert list(trace.by_layer) == [2]
    assert len(captured) == calls == 1


def test_expert_ids_are_told_to_those_who_ask(pair):
    both = pair()
    streams = [both.stream(kind, text(i, 9 + i)) for i, kind in enumerate(("some", "some", "moe", None))]
    asked = {id(s): ([], []) for s in streams}
    for way in (0, 1):
        segments = [s.segment((s.ordinary, s.recorded)[way], routed=asked[id(s)][way]) for s in streams]
        (both.model.step if way else both.model._read)(segments)
    for ordinary, recorded in asked.values():
        assert len(ordinary) == len(recorded)
        for expected, ids in zip(ordinary, recorded, strict=True):
            assert ids.shape == (1, 2)
            assert (np.sort(ids) == np.sort(expected)).all()


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("kind", COVERED)
def test_few_rows_take_selected_experts_and_many_rows_all(pair, kind, rows, monkeypatch):
    both = pair()
    streams = [both.stream(kind, text(i, 5 + i)) for i in range(rows)]
    for cost in (0, 1_000):
        monkeypatch.setattr("model.graphs.blocks.GATHER_COST", cost)
        both.graphs.settle()
        both.graphs._forget()
        expected, rows_ = both.step(streams)
        assert_close(rows_, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [None, *COVERED])
def test_what_is_recorded_needs_no_values_and_no_other_device(device, make_tiny, random_weights, kind):
    """On the device `meta` tensors have shapes alone, and an operation with another device's tensor fails."""
    tiny = make_tiny(torch.bfloat16, kind or "some")
    config = tiny.model.config
    model = assemble(config, {n: w.to("meta") for n, w in random_weights(config, torch.bfloat16).items()})
    graphs = GraphDecoder(model)
    pool = graphs.cache_budget(1 << 12)
    for block in tiny.blocks.values():
        block.to("meta")
    variants = {1: GraphVariant(tiny.variant, 4, model.device)} if kind else {}
    for rows in (1, 16):
        recording = graphs._record(rows, 256, variants, alike=False)
        recording.replay()
        assert recording.batch.hidden.device == pool.keys.device == torch.device("meta")


def test_where_kernels_cannot_be_compiled_torch_computes_and_the_log_says_so(device, monkeypatch, caplog):
    def try_out(device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setitem(sys.modules, "model.graphs.kernels.layers", SimpleNamespace(try_out=try_out))
    monkeypatch.setattr(
        "model.graphs.kernels.layers", sys.modules["model.graphs.kernels.layers"], raising=False
    )
    assert way_on(torch.device("cuda")) is IN_TORCH
    assert "Failed to find C compiler" in caplog.text
