"""How many kernels a device is asked to run: by stage of a prompt, and for every decoded token.

Counted are torch's operations on tensors, as eager code calls them in inference mode, where a norm,
a linear layer and attention are one each, as on a GPU; what writes nothing costs a device nothing.
No GPU is needed for that. A GPU serves some operations with two kernels, and what the compiler
fuses is one kernel for several operations: `profile.py` counts what a GPU really ran.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import median_low

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from llava.eval import markdown
from llava.eval.efficiency.measure import DENSE, Workload, stages_of
from llava.eval.efficiency.stopwatch import Stopwatch
from llava.linear import as_on_a_gpu
from llava.pruning import Pruner
from llava.pruning.captured import nothing_captured

#: operations that compute nothing: views of tensors, and memory that nothing is written to; others
#: that only give back what they were given, such as `to` the same type, are recognised
FREE = frozenset(
    "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze alias split "
    "split_with_sizes diagonal unbind detach unflatten _reshape_alias as_strided narrow chunk "
    "movedim real lift_fresh set_ empty empty_like empty_strided new_empty "
    "new_empty_strided".split()
)
#: tokens of an answer whose steps are counted
TOKENS = 5
#: the place of a page that the table is written into
MARK = "launches"


class Launches(TorchDispatchMode):
    """Notes the names of operations that compute something."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    @property
    def count(self) -> int:
        return len(self.names)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        held = {storage_of(x) for x in tensors_in((args, kwargs))}
        made = any(storage_of(x) not in held for x in tensors_in(out))
        if name not in FREE and (made or func._schema.is_mutable):
            self.names.append(name)
        return out


def tensors_in(values) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class LaunchWatch(Stopwatch):
    """A stopwatch whose moments are launches so far."""

    def __init__(self, launches: Launches):
        super().__init__(torch.device("cpu"))
        self.launches = launches

    def _now(self):
        return self.launches.count


@dataclass
class LaunchCounts:
    """Operations of one call of `generate`.

    vision, select, prefill: of the stages with these names, until the first token
    first_token: of all that comes before the first token
    decode:      of the decoder and head for a further token, most often
    per_token:   of everything for a further token, choosing it included
    per_layer:   `decode` over the number of decoder layers
    """

    name: str
    vision: int
    select: int
    prefill: int
    first_token: int
    decode: int
    per_token: int
    per_layer: float


def count_launches(model, name: str, pruner: Pruner, workload: Workload) -> LaunchCounts:
    """Counts one run of `workload`, of at least three tokens, after one that made what is made once
    (tables of positions and the like). Steps in which a cache grows cost more than `decode`."""
    model.pruner = pruner
    workload.run(model)
    with torch.inference_mode(), as_on_a_gpu(), nothing_captured(), Launches() as launches:
        watch = LaunchWatch(launches)
        found = stages_of(model, pruner, workload, watch)
    steps = [span for span in watch.spans if span.stage == "decode"]
    decode = median_low(step.stop - step.start for step in steps)
    token = median_low(later.start - step.start for step, later in pairwise(steps))
    stages = (found[stage] for stage in ("vision", "select", "prefill", "first_token"))
    return LaunchCounts(name, *stages, decode, token, decode / model.config.num_hidden_layers)


def count_all(model, pruners: dict[str, Pruner], workload: Workload) -> list[LaunchCounts]:
    """The counts of the unpruned model and of every method."""
    every = {DENSE: Pruner(), **pruners}
    counts = [count_launches(model, name, pruner, workload) for name, pruner in every.items()]
    model.pruner = Pruner()
    return counts


def table(counts: list[LaunchCounts]) -> str:
    """The counts as a Markdown table, the unpruned model first."""
    head = ["method", "vision", "select", "prefill", "first token", "more than dense"]
    head += ["per further token", "per layer and token"]
    dense, rows = counts[0], []
    for own in counts:
        name = own.name if own is dense else f"`{own.name}`"
        stages = (own.vision, own.select, own.prefill, own.first_token)
        more = own.first_token - dense.first_token
        cells = [*stages, "–" if own is dense else f"{more:+d}"]
        rows.append([name, *cells, own.per_token, f"{own.per_layer:.1f}"])
    return markdown.table(head, rows, "lr")


def page(about: dict, counts: list[LaunchCounts]) -> str:
    """The table with what it was counted on.

    about: of the run, see `llava.eval.efficiency.program.describe`
    """
    return (
        f"`{about['command']}`\n\n{about['layers']} decoder layers in {about['dtype']}, "
        f"{about['prompt_length']} text tokens and one image per prompt, a budget of "
        f"{about['visual_token_num']} visual tokens, torch {about['torch']}.\n\n{table(counts)}\n"
    )
