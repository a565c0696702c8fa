"""Loops that pick tokens, captured once and replayed on other images of the same shape."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from llava.pruning import captured as module
from llava.pruning.adaptprune import damped_picks
from llava.pruning.captured import SETTINGS, Captures, Graph
from llava.pruning.cdpruner import largest_volume
from llava.pruning.dart import least_alike
from llava.pruning.density_merge import merge
from llava.pruning.density_peaks import cluster
from llava.pruning.divprune import farthest_first
from llava.pruning.eadp import cover_relevant
from llava.pruning.holov import best_of_runs
from llava.pruning.idpruner import marginally_best
from llava.pruning.mmtok import cover_both
from llava.pruning.scope import cover_salient
from llava.pruning.sinkpruner import sanitize
from llava.pruning.tops import preserve
from llava.pruning.visionzip import compress
from llava.pruning.vispruner import drop_duplicates
from llava.pruning.vscan import absorb
from tests.second_device import SECOND, Elsewhere, devices

COUNT = 24
FOUR_FLOATS = {"numel": lambda: 4, "element_size": lambda: 4}


def features(seed: int) -> Tensor:
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(seed))
    x[:, 40:] = x[:, :24]  # the volume is spanned after 16 picks, and there are ties
    return x


def farthest(x: Tensor) -> tuple:
    return farthest_first, (x, COUNT)


def volume(x: Tensor) -> tuple:
    return largest_volume, (x, x[..., 0].abs() + 0.1, COUNT)


def damped(x: Tensor) -> tuple:
    return damped_picks, (x[..., 0].softmax(dim=1), (x @ x.transpose(1, 2)).sigmoid(), COUNT)


def dropped(x: Tensor) -> tuple:
    return drop_duplicates, (x, x[..., 0].argsort(dim=1), 64 - COUNT, 5)


def clustered(x: Tensor) -> tuple:
    valid = torch.arange(64) < torch.tensor([[64], [50]])
    return cluster, (x, valid, torch.tensor([COUNT, 9]), COUNT)


def compressed(x: Tensor) -> tuple:
    return compress, (x, x[..., 0], x[..., :8], COUNT, 6)


def absorbed(x: Tensor) -> tuple:
    return absorb, (x, x[..., 0].argsort(dim=1)[:, :COUNT])


def salient(x: Tensor) -> tuple:
    return cover_salient, (x, x[..., 0].abs(), COUNT, False)


def relevant(x: Tensor) -> tuple:
    return cover_relevant, (x, x[..., 0].abs(), COUNT)


def both(x: Tensor) -> tuple:
    return cover_both, (x, x[..., :8], x[:, ::5], x[:, ::5, 0].abs(), COUNT, 0.02, 0.2, 0.5)


def important(x: Tensor) -> tuple:
    return marginally_best, (x, x[..., 0], COUNT, 0.5)


def runs(x: Tensor) -> tuple:
    return best_of_runs, (x, x[..., 0].softmax(dim=1), COUNT, 7, 0.09)


def preserved(x: Tensor) -> tuple:
    real = torch.arange(64) < torch.tensor([[64], [50]])
    return preserve, (x, x[..., 0].abs(), real, torch.full((2, 2), 0.5), COUNT, False)


def preserved_by_mean(x: Tensor) -> tuple:
    function, args = preserved(x)
    return function, (*args[:-1], True)


def unlike_pivots(x: Tensor) -> tuple:
    numbers = torch.tensor([[COUNT], [COUNT - 1]]), torch.tensor([[2], [1]])
    return least_alike, (x[..., :6].mT, torch.arange(4).expand(2, -1), *numbers)


def sanitized(x: Tensor) -> tuple:
    return sanitize, (x, x[..., 0], 3, 8, COUNT, 5)


def merged(x: Tensor) -> tuple:
    return merge, (x, x[..., 0].argsort(dim=1)[:, :COUNT], 7, 1.0)


LOOPS = [farthest, volume, damped, dropped, clustered, compressed, absorbed]
LOOPS += [salient, relevant, both, important, runs, preserved, preserved_by_mean]
LOOPS += [unlike_pivots, sanitized, merged]
ALL = pytest.mark.parametrize("loop", LOOPS)


def same(found, wanted) -> bool:
    if isinstance(wanted, tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return torch.equal(found, wanted)


class Trace(Graph):
    """The operations of one call, on the CPU: like a graph it knows nothing else of the loop."""

    def __init__(self, function, args, pool):
        where = [n for n, x in enumerate(args) if isinstance(x, Tensor)]

        def call(*tensors):
            given = list(args)
            for place, tensor in zip(where, tensors, strict=True):
                given[place] = tensor
            return function(*given)

        self.where = where
        self.replay = make_fx(call)(*(args[n].clone() for n in where))

    def __call__(self, args):
        return self.replay(*(args[n] for n in self.where))


@pytest.fixture
def captures(monkeypatch):
    """Captures as on a GPU, of `Trace`."""
    kept = Captures()
    monkeypatch.setattr(module, "CAPTURES", kept)
    monkeypatch.setattr(module, "can_capture", lambda tensors: True)
    monkeypatch.setattr(module, "place_of", lambda device: device)
    monkeypatch.setattr(kept, "capture", Trace)
    monkeypatch.setattr(kept, "new_pool", lambda: None)
    return kept


def graphs(captures) -> list:
    return [graph for own in captures.graphs.values() for graph in own.values()]


@ALL
def test_what_is_captured_of_one_image_picks_the_same_on_others(captures, loop):
    for seed in range(6):
        function, args = loop(features(seed))
        before = [x.clone() for x in args if isinstance(x, Tensor)]
        assert same(function(*args), function.__wrapped__(*args))
        given = [x for x in args if isinstance(x, Tensor)]
        assert all(map(torch.equal, before, given))  # arguments are not written to
    assert len(graphs(captures)) == 1


@ALL
def test_nothing_captured_waits_for_the_device(loop):
    function, args = loop(features(0))
    there = [Elsewhere(x, SECOND) if isinstance(x, Tensor) else x for x in args]
    with devices() as log:
        picks = function(*there)
    assert log.waits == [] and log.copies == []
    inner = tuple(x.inner for x in picks) if isinstance(picks, tuple) else picks.inner
    assert same(inner, function(*args))


def test_shapes_are_captured_when_they_come_again(captures):
    for call in range(SETTINGS.after + 2):
        assert len(graphs(captures)) == (call > SETTINGS.after)
        farthest_first(features(call), 5)
    farthest_first(features(0), 6)
    farthest_first(features(0)[:1], 5)
    assert len(graphs(captures)) == 1


def test_the_captures_that_are_not_used_go_first(captures, monkeypatch):
    monkeypatch.setattr(SETTINGS, "most", 2)
    monkeypatch.setattr(SETTINGS, "after", 0)
    x = features(0)
    for count in (3, 4, 3, 5):
        farthest_first(x, count)
    assert [key[-1] for own in captures.graphs.values() for key in own] == [3, 5]


def test_it_can_be_switched_off(captures, monkeypatch):
    monkeypatch.setattr(SETTINGS, "enabled", False)
    for _ in range(SETTINGS.after + 2):
        farthest_first(features(0), 5)
    assert not captures.graphs


def test_on_the_cpu_nothing_is_captured():
    for _ in range(SETTINGS.after + 2):
        farthest_first(features(0), 5)
    assert not module.CAPTURES.graphs


def test_where_gradients_are_recorded_nothing_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), requires_grad=True, **FOUR_FLOATS)
    assert not module.can_capture([on_gpu])
    with torch.no_grad():
        assert module.can_capture([on_gpu])


def test_large_arguments_are_not_captured(monkeypatch):
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), requires_grad=False, **FOUR_FLOATS)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert module.can_capture([on_gpu])
    monkeypatch.setattr(SETTINGS, "most_bytes", 8)
    assert not module.can_capture([on_gpu])
