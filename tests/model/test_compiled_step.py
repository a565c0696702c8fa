"""Steps of decoding as torch compiles them for this CPU: the same tokens, few kernels."""

import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._inductor import cpu_vec_isa
from torch.nn.modules.module import register_module_forward_hook

from llava import linear
from llava.model.kv_cache import KVCache, RowState
from llava.model.language_model import compiled_step
from llava.model.language_model.compiled_step import CompiledStep
from llava.model.language_model.compiling import check_compiler, compiled, prepare
from llava.model.tree_speculation import TreeSpeculation
from llava.pruning import build_pruner
from tests.conftest import make_pruner
from tests.model.test_decode_step import SPECULATE, assert_same, batch, generate
from tests.pruning.test_twigvlm import grown

#: kernels of one layer, and of what layers with the same tokens share in a step
LAYER, GROUP = 14, 1
NOTHING_COMPILED = "test_answers_are_those_of_exact_steps_and_nothing_is_compiled_for_a_later_token"
KERNEL = re.compile(r"(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.aten\.\w+\.\w+)\(")


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        check_compiler(torch.device("cpu"))
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def compiling(model, monkeypatch):
    """Layer by layer, which compiles sooner."""
    monkeypatch.setattr(compiled_step, "FEW_LAYERS", 0)
    model.compile_decoding = True
    yield model
    model.compile_decoding = False


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("part", ["mlp.down_proj", "self_attn", "post_attention_layernorm", ""])
def test_hooks_are_called_though_the_step_was_compiled_before(compiling, sample, part):
    prompt, seen = sample(4, "image", 5), []
    ask = dict(inputs=prompt.ids, images=prompt.images)
    compiling.pruner = build_pruner("none")
    wanted = generate(compiling, ask, max_new_tokens=5)
    watched = compiling.model.layers[1].get_submodule(part)
    hook = watched.register_forward_hook(lambda *_: seen.append(1))
    found = generate(compiling, ask, max_new_tokens=5)
    hook.remove()
    assert_same(found, wanted)
    assert len(seen) == 5
    before = graphs()
    generate(compiling, ask, max_new_tokens=5)
    assert len(seen) == 5 and graphs() == before


def test_hooks_of_all_modules_are_called_in_compiled_steps_too(compiling, sample):
    prompt, seen = sample(4, "image", 5), []
    ask, layer = dict(inputs=prompt.ids, images=prompt.images), compiling.model.layers[1]
    compiling.pruner = build_pruner("none")
    generate(compiling, ask, max_new_tokens=5)
    hook = register_module_forward_hook(lambda part, *_: seen.append(part is layer.mlp))
    generate(compiling, ask, max_new_tokens=5)
    hook.remove()
    assert sum(seen) == 5


@pytest.mark.parametrize("together", [0, pytest.param(12, marks=pytest.mark.slow)])
def test_answers_are_those_of_exact_steps_and_nothing_is_compiled_for_a_later_token(
    model, sample, together, monkeypatch
):
    """Layers that differ in length, rows that differ in length, and a second bucket; layer by
    layer, which compiles sooner, and those of one length as one graph."""
    monkeypatch.setattr(compiled_step, "FEW_LAYERS", together)
    model.pruner = build_pruner("pyramiddrop", visual_token_num=10)
    inputs = batch(sample)
    wanted = generate(model, inputs, max_new_tokens=40)
    model.compile_decoding = True
    try:
        generate(model, inputs, max_new_tokens=3)
        before = graphs()
        assert before > 0
        assert_same(generate(model, inputs, max_new_tokens=40), wanted)
        assert graphs() == before
    finally:
        model.compile_decoding = False


@pytest.mark.parametrize("together", [0, pytest.param(6, marks=pytest.mark.slow)])
def test_a_layer_is_compiled_to_few_kernels(make_model, together, monkeypatch):
    """Also where all layers of a decoder that has few of them are one graph."""
    monkeypatch.setattr(compiled_step, "FEW_LAYERS", together)
    from torch._inductor.utils import run_and_get_code

    decoder = make_model().model
    step = CompiledStep(decoder.rotary, "sdpa")
    cache, x = KVCache(6, reserve=4), torch.randn(1, 1, decoder.config.hidden_size)
    for layer in decoder.layers:
        cache.append(layer.self_attn.layer_idx, *torch.randn(2, 1, 4, 70, 8))
        cache.rows[layer.self_attn.layer_idx] = cache.rows[0] or RowState(torch.tensor([70]), 70)
    compiled.cache_clear()
    torch.compiler.reset()
    with torch.no_grad():
        _, codes = run_and_get_code(step, decoder.layers, x, cache)
    counts = [len(KERNEL.findall(code[code.index("def call(") :])) for code in codes]
    if together:
        assert len(counts) == 1, "one graph for all layers and what they share"
        assert counts[0] <= LAYER * together + GROUP, codes[0]
    else:
        assert len(counts) == 2, "one graph for a layer, and one for what layers share"
        assert counts[0] <= GROUP and counts[1] <= LAYER, codes[1]


@pytest.mark.slow
def test_batches_of_any_size_are_one_graph(model):
    """Also when the first is as long as other inputs of a step are."""
    decoder, step = model.model, CompiledStep(model.model.rotary, "sdpa")
    found = []
    for rows in (2, 3, 4):
        x = torch.randn(rows, 5, decoder.config.hidden_size)
        with torch.no_grad():
            decoder(x, cache=(cache := KVCache(6)))
            step(decoder.layers, x[:, :1].contiguous(), cache)
        found.append(graphs())
    assert len(set(found)) == 1


@pytest.fixture
def counted(monkeypatch):
    """The graphs of steps, as they are traced, which no kernel is made for; as on a processor for
    which few tokens are loops."""
    monkeypatch.setattr(linear, "ON_INTEL", False)
    monkeypatch.setattr(linear, "HAS_TILES", False)
    monkeypatch.setattr(compiled_step, "FEW_LAYERS", 0)
    torch.compiler.reset()
    counter = CompileCounter()

    @cache
    def traced(function):
        return torch.compile(function, fullgraph=True, dynamic=True, backend=counter)

    prepare()
    monkeypatch.setattr(compiled_step, "compiled", traced)
    return counter


def test_tokens_of_any_number_are_few_graphs_and_such_of_a_fixed_one_are_loops(model, counted):
    """A single token, a few, and many are one of a layer each."""
    decoder = model.model
    step = CompiledStep(decoder.rotary, "sdpa")

    def run(count, **options):
        x = torch.randn(1, count, decoder.config.hidden_size)
        with torch.no_grad():
            decoder(x, cache=(cache := KVCache(6)))
            before = counted.frame_count
            step(decoder.layers, x, cache, **options)
        return counted.frame_count - before

    for count in (1, 2, 12):
        run(count)
    assert [run(count) for count in (3, 4, 5, 6, 7, 8, 9, 14)] == [0] * 8
    if linear.KNOWS_FIXED:
        assert run(3, most=4) > 0, "one for a number that is always the same"
        assert run(2, most=4) == 0


def test_however_many_nodes_were_accepted_the_next_tree_grows_by_the_same_graphs(
    make_model, sample, counted
):
    model, prompt = make_model(), sample(4, "image", 5)
    model.lm_head.weight.data *= 4
    twig = grown(model, 2, 2, visual_token_num=30, tree_nodes=8, tree_depth=4, tree_width=2).module
    torch.manual_seed(0)
    for weight in twig.parameters():
        weight.data += 0.15 * weight.std() * torch.randn_like(weight)
    drafts: dict[int, int] = {}
    draft = TreeSpeculation._draft

    def counts(self):
        size, before = sum(x.shape[1] for x in self.waiting), counted.frame_count
        found = yield from draft(self)
        drafts[size] = drafts.get(size, 0) + counted.frame_count - before
        return found

    model.compile_decoding = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeSpeculation, "_draft", counts)
        options = dict(do_sample=False, max_new_tokens=40, eos_token_id=-1, pad_token_id=0)
        model.generate(prompt.ids, images=prompt.images, **options, **SPECULATE)
    model.compile_decoding = False
    several = [made for size, made in drafts.items() if size > 1]
    assert len(several) > 1 and sum(made > 0 for made in several) <= 1, drafts


@pytest.mark.slow
def test_kinds_of_cpu_that_share_a_disk_take_no_code_of_one_another(tmp_path):
    """As on a cluster: torch keeps what it compiled, and code for wider vectors writes too much."""
    if cpu_vec_isa.pick_vec_isa().bit_width() != 512:
        pytest.skip("needs a CPU that can act as a narrower one: with AVX-512")
    test = f"{__file__}::{NOTHING_COMPILED}"
    for kind in ("avx512", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
            env=os.environ
            | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": kind},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, kind + done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "vispruner+pyramiddrop"])
@pytest.mark.parametrize("options", [dict(num_beams=3), dict(repetition_penalty=1.2)], ids=str)
def test_every_search_finds_the_same(compiling, sample, method, options):
    compiling.pruner = make_pruner(method)
    found = generate(compiling, batch(sample), **options)
    compiling.compile_decoding = False
    assert_same(found, generate(compiling, batch(sample), **options))


@pytest.mark.slow
def test_guesses_are_made_and_verified_in_compiled_steps(make_model, sample):
    model, prompt = make_model(), sample(4, "image", 5)
    model.lm_head.weight.data *= 8
    grown(model, 2, 2, visual_token_num=30, draft_stop_prob=0.0)
    options = dict(do_sample=False, max_new_tokens=12, eos_token_id=-1, pad_token_id=0)
    plain = model.generate(prompt.ids, images=prompt.images, **options)
    model.compile_decoding = True
    out = model.generate(prompt.ids, images=prompt.images, **options, **SPECULATE)
    assert torch.equal(out.sequences, plain)
    before = graphs()
    for most in (3, 12):  # guesses of other numbers, as the answer ends elsewhere
        options["max_new_tokens"] = most
        out = model.generate(prompt.ids, images=prompt.images, **options, **SPECULATE)
        assert torch.equal(out.sequences, plain[:, :most]) and graphs() == before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mistral", "own grids"])
def test_other_families_and_types_are_compiled_as_well(
    make_model, own_grids_model, sample, family, dtype
):
    from llava.pruning.testing import tiny

    if family == "mistral":
        model, inputs = make_model(mistral=True), batch(sample)
    else:
        model, prompt = tiny.make_own_grids_model(), tiny.sample(3, "image", 4)
        inputs = dict(inputs=prompt.ids, images=[tiny.picture(3, 4)])
    model.to(dtype)
    wanted = generate(model, inputs)
    model.compile_decoding = True
    found = generate(model, inputs)
    if dtype == torch.float32:
        assert_same(found, wanted)
    else:  # one graph rounds less often
        found, wanted = found.scores[1].float(), wanted.scores[1].float()
        assert (found - wanted).norm() < 0.03 * wanted.norm()
