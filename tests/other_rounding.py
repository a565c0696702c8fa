"""Another kind of CPU, pretended: products and sums are rounded otherwise in the last bit.

    with other_rounding(): ...

Libraries add up in an order that depends on the instructions at hand. What a test expects must not
depend on it, and this shows on one machine whether it does: inside, every product is computed in
double precision and rounded once, which is as right as any order and leaves exact sums exact.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ROUNDED_OTHERWISE = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.convolution,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._softmax,
    aten.linalg_vector_norm,
    aten.mean,
    aten.sum,
    aten.native_layer_norm,
}


class _OtherRounding(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket not in ROUNDED_OTHERWISE or not _has_float32(args):
            return function(*args, **kwargs)
        result = function(*map(_wide, args), **{k: _wide(v) for k, v in kwargs.items()})
        if isinstance(result, (tuple, list)):
            return type(result)(map(_narrow, result))
        return _narrow(result)


def _has_float32(args) -> bool:
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in args)


def _wide(x):
    is_float = isinstance(x, torch.Tensor) and x.dtype == torch.float32
    return x.double() if is_float else x


def _narrow(x):
    return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x


@contextmanager
def other_rounding():
    """Inside, fp32 products, sums, norms and softmax differ from this CPU's in the last bit."""
    with _OtherRounding():
        yield
