"""bench/gpu.py on a machine without a GPU: it says so, and what it measures there can be run here."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))  # its files are scripts and import each other

import gpu

from model.graphs.decoder import GraphDecoder


def test_without_a_gpu_nothing_is_measured_and_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main()


@pytest.mark.parametrize("streams", [1, 5])
def test_all_streams_write_recorded_tokens_while_it_measures(make_tiny, streams):
    tiny = make_tiny(torch.float32, "some", vocab_size=2048)
    tiny.model.graphs = GraphDecoder(tiny.model)
    seconds, work = gpu.step_seconds(tiny.model, "some", tiny.variant, tiny.keys, streams, context=9, steps=3)
    assert seconds > 0
    assert work is None
    prompts, written = tiny.variant.usage.counts.sum(axis=(1, 2))
    assert prompts == streams * 9 * 2 * 2
    assert written == streams * (gpu.WARM_UP + 3) * 2 * 2


def test_what_the_device_did_is_summed_by_kernel():
    def event(name, us, device=DeviceType.CUDA):
        return SimpleNamespace(
            name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: us)
        )

    launch = event("cudaGraphLaunch", 900, DeviceType.CPU)
    work = gpu.DeviceWork.of([event("norm", 3), event("product", 8), launch, event("product", 6)])
    assert work.kernels == 3
    assert work.milliseconds == pytest.approx(0.017)
    assert work.longest == [("product", pytest.approx(0.014), 2), ("norm", pytest.approx(0.003), 1)]
    assert "2 x product" in work.told("dense, 1 streams")


def test_a_step_has_to_read_weights_once_and_every_streams_text(make_tiny):
    tiny = make_tiny(torch.bfloat16, "moe")
    of_a_layer = 64 * 32 + 32 * 32 + 96 * 32 + 32 * 48
    base = 2 * (97 * 32 + 3 * of_a_layer)
    text = 2 * 2 * 3 * 16  # bytes of a token's keys and values
    assert gpu.bytes_a_step(tiny.model, None, 5, 10) == base + 5 * 10 * text
    router, expert = 32 + 8 * 32, 3 * 8 * 32  # float32
    for streams, selected in ((1, 2), (3, 6), (5, 8)):
        read = gpu.bytes_a_step(tiny.model, tiny.variant, streams, 0)
        assert read == base + 2 * 4 * (router + selected * expert)
