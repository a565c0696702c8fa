"""Products of tokens and weights: what `nn.Linear` gives, by the kernel that suits the sizes."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from llava import linear
from llava.blocks import RMSNorm
from llava.linear import Linear, fast_linears, product

#: outputs, inputs: in blocks for one token, small, wide, and large
SHAPES = [(256, 96), (100, 96), (256, 2304), (768, 512)]

needs_kernels = pytest.mark.skipif(not linear.HAS_KERNELS, reason="torch has no MKL here")
needs_fixed = pytest.mark.skipif(not linear.KNOWS_FIXED, reason="torch is older than 2.13")


def made(outputs, inputs, tokens=(), bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*tokens, inputs), (outputs, inputs), (outputs,)]
    x, weight, own = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, own if bias else None


@needs_kernels
@pytest.mark.parametrize("on_intel", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(1, 1), (1,), (2, 1), (1, 5), (3, 4), (2, 40), (0, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_torch(shape, tokens, bias, on_intel, monkeypatch):
    monkeypatch.setattr(linear, "ON_INTEL", on_intel)
    x, weight, own = made(*shape, tokens, bias)
    found, wanted = product(x, weight, own), F.linear(x, weight, own)
    assert found.is_contiguous() and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    "shape, tokens, called, on_intel",
    [
        ((256, 96), 1, "bmm", "addmm"),
        ((100, 96), 1, "addmm", "addmm"),
        ((256, 2304), 1, "addmm", "addmm"),
        ((100, 96), 4, "mm", "addmm"),
        ((100, 96), 9, "addmm", "addmm"),
        ((768, 512), 1, "bmm", "addmm"),
        ((768, 512), 2, "_linear_pointwise", "addmm"),
        ((768, 512), 4, "_linear_pointwise", "_linear_pointwise"),
        ((768, 512), 90, "_linear_pointwise", "_linear_pointwise"),
        ((768, 512), 255, "_linear_pointwise", "_linear_pointwise"),
        ((768, 512), 256, "_linear_pointwise", "addmm"),
    ],
)
@pytest.mark.parametrize("intel", [True, False])
def test_the_kernel_follows_from_sizes_and_processor(
    shape, tokens, called, on_intel, intel, monkeypatch
):
    monkeypatch.setattr(linear, "ON_INTEL", intel)
    names = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    x, weight, bias = made(*shape, (tokens,))
    with Names():
        product(x, weight, bias)
    products = {"bmm", "mm", "addmm", "_linear_pointwise"}
    assert [name for name in names if name in products] == [on_intel if intel else called]


@pytest.mark.parametrize("vendor, found", [("GenuineIntel", True), ("AuthenticAMD", False)])
@pytest.mark.parametrize("linux", [True, False])
def test_the_maker_of_a_processor_is_read_from_the_system(vendor, found, linux, monkeypatch):
    def read(path):
        if not linux:
            raise FileNotFoundError(path)
        return f"processor : 0\nvendor_id : {vendor}\n"

    monkeypatch.setattr(linear.Path, "read_text", read)
    monkeypatch.setattr(linear.platform, "processor", lambda: f"Family 6 Model 1, {vendor}")
    assert linear.is_of_intel() is found


@needs_kernels
def test_a_token_is_a_row_turned_round_for_the_product_of_blocks(monkeypatch):
    """The same numbers with other strides take four times as long."""
    monkeypatch.setattr(linear, "ON_INTEL", False)
    seen, bmm = [], torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda a, b: seen.append((a.stride(), b.stride())) or bmm(a, b)
    )
    x, weight, _ = made(256, 96, (1, 1))
    product(x, weight)
    assert seen == [((128 * 96, 96, 1), (0, 1, 96))]


def test_gradients_autocast_and_small_weights_in_half_precision_go_through_torch(monkeypatch):
    monkeypatch.setattr(linear, "product", None)  # a call would fail
    layer, x = Linear(8, 128), torch.randn(1, 8)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer(torch.randn(8, 4).t())  # not one behind the other
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_layer_without_inputs_gives_its_bias():
    layer = Linear(0, 3)
    with torch.no_grad():
        layer.bias.fill_(2.0)
        assert layer(torch.ones(4, 0)).tolist() == [[2.0] * 3] * 4


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("on_intel", [True, False])
def test_weights_that_are_not_there_are_refused(tokens, on_intel, monkeypatch):
    monkeypatch.setattr(linear, "ON_INTEL", on_intel)
    for size in (32, 768):
        layer = Linear(size, 512, device="meta")
        with torch.no_grad(), pytest.raises(RuntimeError, match="device"):
            layer(torch.randn(tokens, size))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(1, 1), (1,), (2, 1), (1, 5), (0, 1), (2, 40)])
@pytest.mark.parametrize("large", [1, 2**30])
def test_products_in_half_precision_are_those_of_torch(tokens, bias, large, monkeypatch):
    """With the weight on the left, and not."""
    monkeypatch.setattr(linear, "HAS_TILES", True)
    monkeypatch.setattr(linear, "LARGE", large)
    x, weight, own = (None if x is None else x.bfloat16() for x in made(100, 96, tokens, bias))
    found = linear.half_product(x, weight, own)
    assert found.is_contiguous() and found.dtype == torch.bfloat16
    wanted = F.linear(x.float(), weight.float(), None if own is None else own.float())
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
def test_a_large_weight_in_half_precision_is_on_the_left_for_few_tokens_with_amx(
    tokens, size, tiles, monkeypatch
):
    monkeypatch.setattr(linear, "HAS_TILES", tiles)
    monkeypatch.setattr(linear, "LARGE", 100 * 96 if size == "large" else 100 * 96 + 1)
    calls = []
    monkeypatch.setattr(linear, "beside", lambda *words: calls.append(words))
    x, weight, _ = (own.bfloat16() for own in made(100, 96, (tokens,)))
    linear.half_product(x, weight)
    assert bool(calls) == (tiles and size == "large" and tokens < 17)


def code_of(layer, x):
    """What torch compiles for a layer; what that gives must be what the layer gives."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    with torch.no_grad():
        found, (code, *_) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
        close = 0.02 if x.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(found, layer(x), atol=close, rtol=close)
    return code


def calls_a_kernel(code):
    return any(name in code for name in ("extern_kernels.", "torch.ops.mkldnn", "torch.ops.llava"))


#: tokens, then SMALL, LOOPED, WORK_LOOPED and whether there is AMX: whether there is a loop
LOOPS = [
    ((1, 1), 1, 2**21, 1, True, True),
    ((1, 1), 1, 1, 1, True, False),
    ((1, 1), 1, 1, 1, False, True),
    pytest.param((1, 8), 2**18, 1, 1, True, True, marks=needs_fixed),
    ((1, 9), 2**18, 2**21, 2**22, False, False),
    ((1, 3), 1, 2**21, 2**22, True, False),
    pytest.param((1, 3), 1, 1, 3 * 96 * 256, False, True, marks=needs_fixed),
    ((1, 3), 1, 1, 3 * 96 * 256 - 1, False, False),
    ((3, 1), 2**18, 1, 1, True, True),
    ((4, 1), 2**18, 1, 1, True, False),
    ((8, 1), 2**18, 1, 1, False, True),
    ((3, 1), 1, 1, 2**22, False, False),
]


@pytest.mark.parametrize("tokens, small, looped, work, tiles, loops", LOOPS)
def test_few_compiled_tokens_are_loops_over_the_weight(
    tokens, small, looped, work, tiles, loops, monkeypatch, compiler
):
    """One token over any weight, with AMX not over large ones; a few over a small one. So in
    bfloat16, and in fp32 on processors that are not Intel's."""
    values = {"SMALL": small, "LOOPED": looped, "WORK_LOOPED": work, "HAS_TILES": tiles}
    for name, value in values.items():
        monkeypatch.setattr(linear, name, value)
    layer, x = Linear(96, 256), torch.randn(*tokens, 96)
    assert calls_a_kernel(code_of(layer.bfloat16(), x.bfloat16())) == (not loops)
    if linear.HAS_KERNELS and not tiles:
        monkeypatch.setattr(linear, "ON_INTEL", False)
        assert calls_a_kernel(code_of(layer.float(), x)) == (not loops)


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 3])
def test_few_compiled_tokens_in_fp32_are_left_to_mkl_on_intel(tokens, monkeypatch, compiler):
    monkeypatch.setattr(linear, "ON_INTEL", True)
    assert calls_a_kernel(code_of(Linear(96, 256), torch.randn(1, tokens, 96)))


@needs_kernels
@needs_fixed
def test_one_loop_reads_a_weight_once_for_all_tokens_of_a_row(monkeypatch, compiler):
    monkeypatch.setattr(linear, "ON_INTEL", False)
    assert code_of(Linear(96, 256), torch.randn(1, 6, 96)).count("96L*x0") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_before_a_loop_is_computed_once(dtype, monkeypatch, compiler):
    """Not anew for every output of the weight."""
    monkeypatch.setattr(linear, "ON_INTEL", False)
    layer = nn.Sequential(RMSNorm(96, 1e-5), Linear(96, 256)).to(dtype)
    code = code_of(layer, torch.randn(1, 1, 96, dtype=dtype))
    before, loop = code.split("x0<static_cast<int64_t>(256L)", maxsplit=1)
    assert "sqrt(" in before and "sqrt(" not in loop


@needs_kernels
@needs_fixed
@pytest.mark.parametrize(
    "shape, dtype, intel, worth",
    [
        ((1, 2, 96), torch.float32, False, True),
        ((1, 8, 96), torch.float32, False, True),
        ((1, 9, 96), torch.float32, False, False),
        ((1, 1, 96), torch.float32, False, False),
        ((2, 2, 96), torch.float32, False, False),
        ((1, 2, 96), torch.float32, True, False),
        ((1, 2, 96), torch.bfloat16, True, True),
        ((1, 2, 96), torch.float16, False, False),
    ],
)
def test_a_fixed_number_of_tokens_has_a_graph_of_its_own_where_that_has_loops(
    shape, dtype, intel, worth, monkeypatch
):
    monkeypatch.setattr(linear, "ON_INTEL", intel)
    assert linear.is_faster_fixed(torch.zeros(shape, dtype=dtype)) == worth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_for_any_number_of_tokens_has_no_loops_for_one_number(dtype, monkeypatch, compiler):
    """Else every number of few tokens were a graph of its own; one that is fixed may be."""
    monkeypatch.setattr(linear, "ON_INTEL", False)
    monkeypatch.setattr(linear, "HAS_TILES", False)
    torch._dynamo.reset()
    layer, counter = Linear(96, 256).to(dtype), CompileCounter()
    run = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for tokens in (2, 3, 5, 8, 4):
            x = torch.randn(1, tokens, 96, dtype=dtype)
            torch.testing.assert_close(run(x), layer(x), atol=0.02, rtol=0.02)
        assert counter.frame_count == 1
        for tokens in (30, 9, 100):
            run(torch.randn(1, tokens, 96, dtype=dtype))
        assert counter.frame_count == 2
        run(torch.randn(30, 96, dtype=dtype))
        for tokens in (2, 5, 3):
            run(torch.randn(tokens, 96, dtype=dtype))
        assert counter.frame_count == 4


@needs_kernels
def test_the_operation_is_there_once_in_a_process_also_for_modules_imported_anew():
    code = """if True:
        import gc, importlib, sys, torch
        import llava.linear as first
        importlib.reload(first)
        del sys.modules["llava.linear"], first
        import llava.linear
        gc.collect()
        print(torch.ops.llava.linear(torch.ones(1, 2, 3), torch.ones(4, 3), None).shape)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 2, 4])\n", done.stderr


@needs_kernels
@pytest.mark.parametrize("on_intel", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_several_tokens_and_large_weights_compile(on_intel, bias, monkeypatch, compiler):
    """torch compiles its operation of oneDNN for constant weights alone."""
    monkeypatch.setattr(linear, "ON_INTEL", on_intel)
    monkeypatch.setattr(linear, "WORK_LOOPED", 1)
    layer = Linear(512, 768, bias=bias)
    for shape in [(1, 4, 512), (2, 90, 512), (100, 512)]:
        assert "torch.ops.llava.linear" in code_of(layer, torch.randn(*shape))


@needs_kernels
def test_layers_of_others_keep_their_weights(monkeypatch):
    class Own(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(8, 128), nn.Sequential(nn.Linear(128, 4)), Own(4, 4))
    x, names = torch.randn(1, 8), list(module.state_dict())
    with torch.no_grad():
        wanted = module(x)
    fast_linears(module)
    assert [type(module[0]), type(module[1][0]), type(module[2])] == [Linear, Linear, Own]
    calls = []
    monkeypatch.setattr(linear, "product", lambda *a: calls.append(a) or product(*a))
    with torch.no_grad():
        torch.testing.assert_close(module(x), wanted)
    assert len(calls) == 2 and list(module.state_dict()) == names
