"""The engine over recorded calls: the same tokens as without them, and one wait for the device a step."""

import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from model.checkpoints.load import assemble
from model.graphs.decoder import GraphDecoder
from model.sampling import SamplingParams
from server.engine import choosing
from server.engine.counters import Observers
from server.engine.engine import Engine
from server.engine.scheduler import SchedulerConfig
from server.engine.sequence import Report, Sequence

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
REQUESTS = {
    "dense": {"temperature": 0.0},
    "some": {"temperature": 0.8, "seed": 3},
    "moe": {"temperature": 1.2, "seed": 4},
    "mom": {"temperature": 0.0},
    "fm-moe": {"temperature": 0.0},
    "filtered": {"temperature": 1.0, "seed": 5, "top_p": 0.8},
    "adjusted": {"temperature": 0.7, "seed": 6, "frequency_penalty": 0.5},
    "top_k 1": {"temperature": 1.0, "top_k": 1},
}
PROMPT_TOKENS, MAX_TOKENS = 20, 25


@dataclass
class Served:
    engine: Engine
    keys: object

    def request(self, name, number=0):
        """A sequence, and the events that it gets."""
        events = []
        variant = name if name in self.engine.variants else None
        sequence = Sequence(
            sequence_id=name,
            prompt_token_ids=tuple((7 * i + number + len(name)) % 97 for i in range(PROMPT_TOKENS)),
            params=SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, **REQUESTS[name]),
            endpoint=variant or "dense",
            variant=variant,
            keys=self.keys if variant == "some" else None,
            teach=None,
            deliver=events.append,
            eos_token_id=2,
            arrived_at=time.monotonic(),
            report=Report(routed_experts=variant == "moe"),
        )
        self.engine.scheduler.waiting.append(sequence)
        return sequence, events


@pytest.fixture(params=PLACES)
def serve(request, make_tiny, random_weights):
    """serve(recorded): an engine of every variant, with recorded calls or without."""
    device = request.param

    def made(*, recorded):
        tinies = {kind: make_tiny(torch.float32, kind) for kind in ("some", "moe", "mom", "fm-moe")}
        config = tinies["some"].model.config
        model = assemble(config, {n: w.to(device) for n, w in random_weights(config, torch.float32).items()})
        for tiny in tinies.values():
            for block in tiny.blocks.values():
                block.to(device)
        model.graphs = GraphDecoder(model) if recorded else None
        nobody = Observers(*[lambda endpoint, seconds: None] * 4)
        variants = {kind: tiny.variant for kind, tiny in tinies.items()}
        plastic = dict.fromkeys((*variants, "dense"), frozenset())
        config = SchedulerConfig(max_running=8, prefill_chunk=16, step_tokens=32)
        engine = Engine(model, variants, config, 8 * 64, plastic, time.monotonic, nobody)
        return Served(engine, tinies["some"].keys)

    return made


def run(served):
    """Everybody's tokens and routing, half of them joining while the others write."""
    requests = []
    for number, name in enumerate(2 * list(REQUESTS)):
        requests.append(served.request(name, number))
        served.engine.step()
    while not served.engine.idle:
        served.engine.step()
    texts = [sum((event.token_ids for event in events), ()) for _, events in requests]
    routed = [sum(len(rows) for event in events for rows in event.routed) for _, events in requests]
    return texts, routed, {name: v.usage.counts.copy() for name, v in served.engine.variants.items()}


@pytest.mark.parametrize("together", [False, True])
def test_an_engine_writes_the_same_with_recorded_calls_as_without(serve, monkeypatch, together):
    expected = run(serve(recorded=False))
    if together:
        monkeypatch.setattr(choosing, "pays", lambda logits: True)
    served = serve(recorded=True)
    texts, routed, usage = run(served)
    assert all(len(text) == MAX_TOKENS for text in texts)
    assert texts == expected[0]
    assert routed == expected[1]
    assert max(routed) == PROMPT_TOKENS + MAX_TOKENS - 1
    assert all((usage[name] == counts).all() for name, counts in expected[2].items())
    assert served.engine.cache.reserved_tokens == 0


def test_what_was_routed_is_counted_when_the_step_ends(serve):
    served = serve(recorded=True)
    sequence, _ = served.request("some")
    usage = served.engine.variants["some"].usage
    while not served.engine.idle:
        served.engine.step()
        fed = sequence.prefilled + max(0, len(sequence.generated) - 1)
        assert usage.counts.sum() == fed * 2 * 2  # layers, experts per token


def test_a_reservation_waits_for_a_stretch_without_a_gap(serve):
    served = serve(recorded=True)
    running = [served.request(name) for name in REQUESTS]
    served.engine.step()
    for sequence, _ in running[::2]:
        sequence.ended = "cancelled"
    long, events = served.request("dense")
    long.params = SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True)
    served.engine.step()
    assert served.engine.cache.reserved_tokens == 4 * 64  # half of the memory, in four pieces
    assert list(served.engine.scheduler.waiting) == [long]
    while not served.engine.idle:
        served.engine.step()
    assert sum(len(event.token_ids) for event in events) == 80


@contextmanager
def waits():
    """Takes in a line for every time that the host waits for the device."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]


@pytest.mark.gpu
def test_the_host_waits_for_the_device_once_a_step(serve):
    served = serve(recorded=True)
    if served.engine.model.device.type != "cuda":
        return
    for name in ("dense", "some", "top_k 1"):
        served.request(name)
    for _ in range(6):  # prompts, and one step that records
        served.engine.step()
    with waits() as found:
        served.engine.step()
    assert len(found) == 1, found
