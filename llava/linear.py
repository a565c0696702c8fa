"""Products of tokens and weights, on a CPU by the kernels of torch that suit their sizes.

In fp32 torch hands all of them to MKL in the same way. Products of few tokens wait for the weights
alone. On a processor of AMD (docs/Efficiency.md) MKL reads those at two thirds of the memory's
speed for one token, and at a third for a few: there torch has kernels that are faster. On Intel's
own MKL is the fastest of all for so few. Results differ in the order of summation alone.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: numbers of a weight that stays in a processor's own cache (1 MB)
SMALL = 2**18
#: outputs that are computed together for a single token, from inputs of so many numbers at most
BLOCK, WIDEST = 128, 2048
#: most tokens for which small weights are the left operand
FEW = 4
#: most tokens for which MKL is the fastest on a processor of Intel, whatever the weight
FEW_ON_INTEL = 3


class Linear(nn.Linear):
    """`nn.Linear`; without gradients and on a CPU computed by `product` in fp32, and by
    `compiled_row` where one token in bfloat16 is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        if not OWN_WAYS or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return F.linear(x, self.weight, self.bias)
        if is_ours(x) and is_ours(self.weight):
            return product(x, self.weight, self.bias)
        if torch.compiler.is_compiling() and is_a_row(x) and is_a_row(self.weight[:1]):
            return compiled_row(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def fast_linears(module: nn.Module) -> None:
    """Makes every plain `nn.Linear` in a module that others wrote a `Linear`, with its weights."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear


def is_ours(x: Tensor) -> bool:
    """Whether products of x are fp32 on a CPU that torch uses MKL on."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() and HAS_KERNELS


def is_a_row(x: Tensor) -> bool:
    """Whether x (..., K) is one token in bfloat16 on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[:-1].numel() == 1


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """A block in which a CPU does nothing in its own way, so that operations can be counted as a
    GPU is asked for them: not here, and not in `llava.blocks.in_pieces`."""
    global OWN_WAYS
    OWN_WAYS = False
    try:
        yield
    finally:
        OWN_WAYS = True


OWN_WAYS = True
HAS_KERNELS = (
    torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def is_of_intel() -> bool:
    """Whether this is a processor of Intel; MKL asks for that, too, before it picks a kernel."""
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        known = platform.processor()
    return "GenuineIntel" in known


ON_INTEL = is_of_intel()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the transpose of weight (N, K), plus bias (N,) -> (..., N).

    All are contiguous, in fp32 and on a CPU; nothing is differentiated.
    """
    tokens, outputs, inputs = x.shape[:-1].numel(), *weight.shape
    if ON_INTEL and (weight.numel() <= SMALL or tokens <= FEW_ON_INTEL):
        return F.linear(x, weight, bias)
    if tokens == 1 and inputs <= WIDEST and outputs % BLOCK == 0:
        out = _in_blocks(x.view(1, inputs), weight)
    elif 1 < tokens <= FEW and weight.numel() <= SMALL:
        out = (weight @ x.view(tokens, inputs).t()).t().contiguous()
    elif tokens > 1 and weight.numel() > SMALL:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # oneDNN
    else:
        return F.linear(x, weight, bias)
    out = out.view(*x.shape[:-1], outputs)
    return out if bias is None else out + bias


def compiled_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `product` for a single token in half precision, summed in fp32: compiled it becomes one
    loop over the weight, which reads it faster than oneDNN does."""
    out = (x.flatten().float() * weight.float()).sum(dim=-1)
    out = out if bias is None else out + bias
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def _in_blocks(row: Tensor, weight: Tensor) -> Tensor:
    """weight (N, K) times a row (1, K) as products of blocks of its rows: MKL's kernel for those
    reads several rows at once, that for a matrix and a vector one.

    The column must come as a row turned round: of one that is given as (K, 1) MKL is told that its
    numbers lie side by side, and is slower than for a vector.
    """
    blocks = weight.view(-1, BLOCK, weight.shape[1])
    return torch.bmm(blocks, row.t().expand(len(blocks), -1, -1))
