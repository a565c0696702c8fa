"""Products of tokens and weights: what `nn.Linear` gives, by the kernel that suits the sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llava import linear
from llava.linear import Linear, fast_linears, product

#: outputs, inputs: in blocks for one token, small, wide, and large
SHAPES = [(256, 96), (100, 96), (256, 2304), (768, 512)]

needs_kernels = pytest.mark.skipif(not linear.HAS_KERNELS, reason="torch has no MKL here")


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


@pytest.mark.parametrize(
    "tokens, small, looped, tiles, loops",
    [
        (1, 1, 2**21, True, True),
        (1, 1, 1, True, False),
        (1, 1, 1, False, True),
        (3, 2**18, 1, True, True),
        (4, 2**18, 2**21, True, False),
        (3, 1, 2**21, False, False),
    ],
)
def test_few_compiled_tokens_in_half_precision_are_loops_over_the_weight(
    tokens, small, looped, tiles, loops, monkeypatch
):
    """One token over any weight, with AMX not over large ones; up to three over a small one."""
    from torch._inductor.utils import run_and_get_code

    from llava.model.language_model.compiling import check_compiler, prepare

    try:
        check_compiler(torch.device("cpu"))
    except RuntimeError as error:
        pytest.skip(str(error))
    prepare()  # or torch takes code that another kind of CPU left in its cache
    for name, value in {"SMALL": small, "LOOPED": looped, "HAS_TILES": tiles}.items():
        monkeypatch.setattr(linear, name, value)
    layer, x = Linear(96, 256).bfloat16(), torch.randn(1, tokens, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        found, (code, *_) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
        torch.testing.assert_close(found, layer(x), atol=0.02, rtol=0.02)
    called = "extern_kernels." in code or "torch.ops.mkldnn" in code
    assert called == (not loops)


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
