"""Work becomes a graph of the device that it is on, whichever device and mode is current."""

import pytest
import torch

from llava.model.language_model.cuda_graphs import CudaCapture
from llava.pruning import captured
from tests.pretended_cuda import PretendedCuda

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch):
    captured.stream_aside.cache_clear()
    yield PretendedCuda(monkeypatch)
    captured.stream_aside.cache_clear()


def step(cuda, device, done):
    """Work that is one kernel of a device."""

    def work():
        cuda.launch(device, lambda: done.append(device))
        return [torch.zeros(1)]

    return work


@pytest.mark.parametrize("devices", [[SECOND], [FIRST, SECOND], [SECOND, FIRST]], ids=str)
def test_a_step_is_captured_on_the_device_it_is_on(cuda, devices):
    """Where a model is on cuda:1, cuda:0 is current, and may have captured before."""
    for device in devices:
        done: list = []
        replay = CudaCapture()(step(cuda, device, done), device)
        assert done == [device]  # once to warm up
        replay()
        assert done == [device] * 2 and cuda.current == 0


@pytest.mark.parametrize("devices", [[SECOND], [FIRST, SECOND], [SECOND, FIRST]], ids=str)
def test_so_is_a_loop_that_picks_tokens(cuda, devices):
    for device in devices:
        done: list = []
        work = step(cuda, device, done)
        graph, _ = captured.capture(work, device, None)
        graph.replay()
        assert done == [device] * 2


def test_other_threads_may_use_the_device_meanwhile(cuda):
    """A server prepares images while it decodes."""
    CudaCapture()(step(cuda, FIRST, []), FIRST)
    assert cuda.modes == ["thread_local"]


def test_graphs_are_captured_inside_and_outside_of_inference_mode(cuda):
    """torch keeps one tensor for the random numbers of all graphs of a device."""
    with torch.inference_mode():
        CudaCapture()(step(cuda, FIRST, []), FIRST)
    with torch.no_grad():
        CudaCapture()(step(cuda, FIRST, []), FIRST)


def test_a_failed_capture_leaves_the_way_free(cuda):
    def broken():
        raise RuntimeError("out of memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            CudaCapture()(broken, FIRST)
    assert not captured.CAPTURING.locked()
