"""Moments of a model are those of the device that it is on."""

import torch

from llava.eval.efficiency.stopwatch import Stopwatch
from tests.pretended_cuda import PretendedCuda


def test_stages_are_timed_on_the_device_of_the_model(monkeypatch):
    """With --device cuda:1, cuda:0 is current, whose stream knows nothing of the work."""
    cuda, second = PretendedCuda(monkeypatch), torch.device("cuda", 1)
    watch = Stopwatch(second)
    with watch.span("prefill") as span:
        pass
    assert watch.read() == {"prefill": [0.001]}
    assert span.start.stream.device == span.stop.stream.device == second and cuda.waited == [1]
