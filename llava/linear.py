"""Products of tokens and weights, on a CPU by the kernels of torch that suit their sizes.

In fp32 torch hands all of them to MKL in the same way. Products of few tokens wait for the weights
alone. On a processor of AMD (docs/CPU.md) MKL reads those at two thirds of the memory's
speed for one token, and at a third for a few: there torch has kernels that are faster. On Intel's
own MKL is the fastest of all for so few.

In bfloat16 torch hands them to oneDNN. With AMX it turns the right operand into tiles before it
multiplies, so it is faster where the weight stands on the left. And it spends a fixed time on each
product, which is most of what a small weight takes.

Compiled code has loops of its own for few tokens, which read a weight once for all of them: in
bfloat16, and in fp32 on processors that are not Intel's.

Results differ in the order of summation; those of compiled loops may also be rounded less often.
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
#: up to so many tokens, and from so many on, MKL is the fastest on a processor of Intel, whatever
#: the weight; most of all for the 577 of a CLIP tower
FEW_ON_INTEL, MANY_ON_INTEL = 3, 256
#: in bfloat16 one compiled token is a loop over a weight of so many numbers, with AMX at most
LOOPED = 2**21
#: most compiled tokens for which there is a loop over a `SMALL` weight; with AMX for so many at
#: most, if their number may change
FEW_LOOPED, ROWS_LOOPED = 8, 3
#: most tokens, if their number is fixed, times numbers of a larger weight, without AMX
WORK_LOOPED = 2**22
#: with AMX a weight in bfloat16 of so many numbers or more is the left operand, for so many tokens
LARGE, FEW_BESIDE = 2**20, 16


class Linear(nn.Linear):
    """`nn.Linear`; without gradients and on a CPU computed by `product` in fp32, and by
    `half_product` in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        # Seven times per layer and token: what is asked here, and how, takes time itself.
        weight, bias, dtype = self.weight, self.bias, x.dtype
        if not x.is_cpu or torch.is_grad_enabled() or not OWN_WAYS or dtype is not weight.dtype:
            return F.linear(x, weight, bias)
        if not weight.is_cpu or not weight.numel():  # which oneDNN would not ask
            return F.linear(x, weight, bias)
        if x.is_contiguous() and weight.is_contiguous() and not torch.is_autocast_enabled("cpu"):
            if dtype is torch.float32 and HAS_KERNELS:
                return product(x, weight, bias)
            if dtype is torch.bfloat16:
                return half_product(x, weight, bias)
        return F.linear(x, weight, bias)


def fast_linears(module: nn.Module) -> None:
    """Makes every plain `nn.Linear` in a module that others wrote a `Linear`, with its weights."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """A block in which a CPU does nothing in its own way, so that operations can be counted as a
    GPU is asked for them: not here, and not in `llava.blocks.in_pieces`."""
    global OWN_WAYS
    before, OWN_WAYS = OWN_WAYS, False
    try:
        yield
    finally:
        OWN_WAYS = before


#: whether a CPU multiplies in its own ways, see `as_on_a_gpu`
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


def cpu_knows(*names: str) -> bool:
    """Whether this CPU has one of these sets of instructions, by torch's names for them; False
    before torch 2.11, which does not say."""
    read = getattr(torch.cpu, "get_capabilities", None)
    found = read() if read else {}
    return any(found.get(name) for name in names)


ON_INTEL = is_of_intel()
HAS_TILES = cpu_knows("amx_bf16")
#: whether compiled code may ask which sizes are symbols; seen to be so from this version on
KNOWS_FIXED = torch.__version__ >= (2, 13)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the transpose of weight (N, K), plus bias (N,) -> (..., N).

    All are contiguous, in fp32 and on a CPU; nothing is differentiated.
    """
    outputs, inputs = weight.shape
    tokens = x.numel() // inputs
    if ON_INTEL and (weight.numel() <= SMALL or not FEW_ON_INTEL < tokens < MANY_ON_INTEL):
        return F.linear(x, weight, bias)
    compiling = torch.compiler.is_compiling()
    if compiling and is_looped(x, weight):
        return looped(x, weight, bias)
    if tokens == 1 and inputs <= WIDEST and outputs % BLOCK == 0:
        out = _in_blocks(x.view(1, inputs), weight)
    elif 1 < tokens <= FEW and weight.numel() <= SMALL:
        out = (weight @ x.view(tokens, inputs).t()).t().contiguous()
    elif tokens > 1 and weight.numel() > SMALL:
        return torch.ops.llava.linear(x, weight, bias) if compiling else by_onednn(x, weight, bias)
    else:
        return F.linear(x, weight, bias)
    out = out.view(*x.shape[:-1], outputs)
    return out if bias is None else out + bias


def half_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `product`, in bfloat16."""
    tokens, size = x.numel() // x.shape[-1], weight.numel()
    if torch.compiler.is_compiling() and is_looped(x, weight):
        return looped(x, weight, bias)
    if HAS_TILES and size >= LARGE and 0 < tokens <= FEW_BESIDE:
        return beside(x, weight, bias)
    return F.linear(x, weight, bias)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `product`, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _of_its_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


# The same for compiled code: torch compiles its own for weights that are constants alone. It is
# there once in a process, also where this module is imported anew.
if not hasattr(torch.ops.llava, "linear"):
    torch.library.define("llava::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    torch.library.impl("llava::linear", "CPU", by_onednn)
    torch.library.impl("llava::linear", "Meta", _of_its_shape)


def is_looped(x: Tensor, weight: Tensor) -> bool:
    """Whether compiled code multiplies x (..., K) and weight in a loop."""
    size = weight.numel()
    tokens = x.numel() // weight.shape[1]
    if tokens == 1:
        return size <= LOOPED or not HAS_TILES
    if may_change(x):
        return size <= SMALL and 1 < tokens <= (ROWS_LOOPED if HAS_TILES else FEW_LOOPED)
    few = size <= SMALL or not HAS_TILES and tokens * size <= WORK_LOOPED
    return few and 1 < tokens <= FEW_LOOPED


def may_change(x: Tensor) -> bool:
    """Whether compiled code serves other numbers of tokens than x (..., K) has, too: those of
    several rows, and of one row where its size is a symbol. A loop for each were many graphs."""
    return x.dim() > 2 and len(x) > 1 or not is_fixed(x.numel() // x.shape[-1])


def is_faster_fixed(x: Tensor) -> bool:
    """Whether compiled code that is for this number of tokens alone is worth a graph of its own:
    its products of x (B, q, K) with small weights are then loops that several numbers do not have.
    """
    if not (x.is_cpu and len(x) == 1 and 1 < x.shape[1] <= FEW_LOOPED and KNOWS_FIXED):
        return False
    return x.dtype is torch.bfloat16 or x.dtype is torch.float32 and HAS_KERNELS and not ON_INTEL


def is_fixed(number: int) -> bool:
    """Whether compiled code is for this number alone; False where torch does not say."""
    return KNOWS_FIXED and torch.fx.experimental.symbolic_shapes.has_static_value(number)


def looped(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `product`, summed in fp32: compiled it becomes one loop over the weight for all tokens; if
    their number `may_change`, one for each of them."""
    tokens, weight = materialized(x.reshape(-1, x.shape[-1]).float()), weight.float()
    if may_change(x):
        out = (tokens[:, None] * weight).sum(dim=-1)
    else:
        out = torch.stack([(token * weight).sum(dim=-1) for token in tokens.unbind()])
    out = out if bias is None else out + bias
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def materialized(x: Tensor) -> Tensor:
    """x as compiled code writes it to memory, once: in the loops that read it torch would compute
    it anew, a norm for each output of a weight."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def beside(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `product`, with the weight as left operand. A single token counts twice: products of a
    matrix and a vector take another way, which is slower."""
    rows = x.view(-1, x.shape[-1])
    tokens = len(rows)
    turned = (rows.expand(2, -1) if tokens == 1 else rows).t()
    out = weight @ turned if bias is None else torch.addmm(bias[:, None], weight, turned)
    return out.t()[:tokens].contiguous().view(*x.shape[:-1], -1)


def _in_blocks(row: Tensor, weight: Tensor) -> Tensor:
    """weight (N, K) times a row (1, K) as products of blocks of its rows: MKL's kernel for those
    reads several rows at once, that for a matrix and a vector one.

    The column must come as a row turned round: of one that is given as (K, 1) MKL is told that its
    numbers lie side by side, and is slower than for a vector.
    """
    blocks = weight.view(-1, BLOCK, weight.shape[1])
    return torch.bmm(blocks, row.t().expand(len(blocks), -1, -1))
