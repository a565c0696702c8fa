"""What a GPU does in its own way: loops as graphs, attention inside segments by one kernel."""

import pytest
import torch
from torch import Tensor

from llava import segments
from llava.pruning.captured import CAPTURES, SETTINGS, captured
from llava.segments import attend_within
from tests.pruning.test_captured import ALL, features, graphs, same
from tests.test_segments import OWNERS, one_by_one, several_sizes, tokens


@ALL
def test_a_graph_picks_what_the_loop_picks(cuda, loop):
    CAPTURES.clear()
    for seed in range(SETTINGS.after + 4):
        function, args = loop(features(seed))
        args = [x.to(cuda) if isinstance(x, Tensor) else x for x in args]
        with torch.inference_mode(seed % 2 == 0):
            found = function(*args)
        assert same(found, function.__wrapped__(*args))
    assert len(graphs(CAPTURES)) == 1


def test_what_a_graph_gave_outlives_its_next_replay(cuda):
    CAPTURES.clear()

    @captured
    def double(x: Tensor) -> Tensor:
        return x * 2

    given = [torch.full((4,), n, device=cuda) for n in range(SETTINGS.after + 3)]
    found = [double(x) for x in given]
    assert graphs(CAPTURES)
    assert [own[0].item() for own in found] == [2 * n for n in range(len(given))]


@pytest.mark.parametrize("width", [8, 80])
def test_attention_inside_segments_is_that_of_the_cpu(cuda, width):
    if torch.cuda.get_device_capability(cuda) < (8, 0):
        pytest.skip("no FlashAttention below compute capability 8.0")
    if segments.all_sizes() is None:
        pytest.skip("torch attends inside segments of any sizes from 2.10 on")
    there = tokens(len(OWNERS), 2, width, device=cuda, dtype=torch.bfloat16)
    assert segments.takes_all_sizes(there[0])
    found = attend_within(*there, several_sizes().to(there[0].device))
    wanted = one_by_one(*(x.float().cpu() for x in there))
    torch.testing.assert_close(found.float().cpu(), wanted, atol=2e-2, rtol=2e-2)
