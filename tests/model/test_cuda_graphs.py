"""Work becomes a graph of the device that it is on, whichever device and mode is current."""

import gc

import pytest
import torch

from llava.model.kv_cache import KVCache
from llava.model.language_model.cuda_graphs import CudaCapture, GraphStep
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


class Interrupted(dict):
    """Spare buffers; another thread has its turn whenever somebody has looked at them."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def _then_the_other(self, found):
        other, self.other = self.other, None
        if other is not None:
            other()
        return found

    def get(self, *words):
        return self._then_the_other(super().get(*words))

    def pop(self, *words):
        return self._then_the_other(super().pop(*words))


def claimed(step):
    """A cache of one layer, and its buffers."""
    cache = KVCache(1)
    cache.append(0, *torch.zeros(2, 1, 2, 3, 4))
    return cache, cache.claim(0, 1, step.allocate)


def test_buffers_that_come_back_while_another_answer_begins_belong_to_one_of_them():
    """Where a client leaves, an answer of a server ends beside those that go on."""
    step, found = GraphStep(None, "sdpa", capture=lambda work, device: work), []
    ending = claimed(step)
    step.spare = Interrupted(lambda: found.append(claimed(step)))
    step.spare[0] = [torch.zeros(1, 2, 512, 4) for _ in range(2)]  # larger ones stay
    del ending  # in one thread, while the other one begins an answer
    gc.collect()
    ((_, (keys, _)),) = found
    assert all(own[0].data_ptr() != keys.data_ptr() for own in step.spare.values())
    assert len(step.spare) == 1
