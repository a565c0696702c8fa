"""Memory and least times of a model follow from its sizes."""

import pytest
import torch

from llava.eval.efficiency import needs
from llava.eval.efficiency.needs import PUBLISHED, Needs
from llava.eval.efficiency.random_model import build_random_model, shapes
from llava.pruning import build_pruner, trace_pruning
from tests.paths import GOLDEN

TINY = [str(GOLDEN / "tiny-llava-v1.5"), str(GOLDEN / "tiny-qwen2.5-vl-cut")]


@pytest.mark.parametrize("folder", TINY)
def test_weights_in_16_bits_are_those_of_the_model(folder):
    found = Needs.of(folder)
    model = build_random_model(*shapes(folder), dtype=torch.bfloat16)
    assert found.weights[16] == sum(weight.nbytes for weight in model.parameters())
    tower = model.get_vision_tower()
    assert found.tower == sum(weight.numel() for weight in tower.parameters())


@pytest.mark.parametrize("folder", TINY)
def test_fewer_bits_shrink_the_matrices_of_the_decoder_alone(folder):
    found = Needs.of(folder)
    model = build_random_model(*shapes(folder), dtype=torch.bfloat16)
    layers = [p for name, p in model.named_parameters() if ".layers." in name]
    matrices = [p for p in layers if p.ndim == 2 and p.shape[0] > 1]
    tower = {id(p) for p in model.get_vision_tower().parameters()}
    matrices = [p for p in matrices if id(p) not in tower]
    count, heads = sum(m.numel() for m in matrices), sum(len(m) for m in matrices)
    assert found.weights[16] - found.weights[8] == count - 4 * heads  # a scale of 4 bytes per row
    saved = found.weights[16] - found.weights[4]
    assert saved == pytest.approx(count * (2 - 0.5 - 1 / 64 - 1 / 4096))


def test_sizes_of_published_models_are_theirs():
    counts = {name: Needs.of(name).parameters for name in ("7b", "qwen2.5-vl-3b")}
    assert counts == {"7b": 7_062_902_784, "qwen2.5-vl-3b": 3_754_622_976}
    assert set(PUBLISHED) < set(needs.CONFIGS)


def test_the_cache_is_the_one_that_a_prefill_leaves(model, sample):
    found = Needs.of(TINY[0])
    shape = found.shape.from_config(model.config)
    ids = sample(3, "image", 4)
    model.pruner = build_pruner("none")
    with trace_pruning(model) as trace:
        model.generate(ids.ids, images=ids.images, max_new_tokens=1, do_sample=False)
    tokens = int(trace.kv_lengths[0][0])
    own = Needs(1, {}, 1, 1, 36, 1, shape)
    inside = 2 * tokens * (8 * shape.hidden_size + 3 * shape.intermediate_size)
    cache = own.working_bytes(36, tokens - 36, 1) - inside
    bytes_per_value = next(model.parameters()).itemsize
    assert cache == trace.kv_bytes // bytes_per_value * 2


def test_a_pruned_prompt_needs_less_memory_and_time():
    found = Needs.of("7b")
    assert found.visual_tokens == 576 and found.kept == 64
    assert found.working_bytes(64, 64, 1) < found.working_bytes(576, 64, 1) / 4
    first = [found.first_token(visual, 64, 312e12, 2039e9) for visual in (64, 576)]
    assert first[0] < first[1] / 3
    # few tokens wait for the weights: half of them take no less
    assert found.first_token(8, 8, 312e12, 2e12) == found.first_token(4, 4, 312e12, 2e12)
    later = [found.next_token(visual, 64, 2039e9) for visual in (64, 576)]
    assert later[0] < later[1] < 1.1 * later[0]


def test_next_cuts_an_image_into_five_crops():
    found = Needs.of("next-7b")
    assert (found.patches, found.visual_tokens, found.kept) == (2880, 2880, 320)


def test_the_smallest_gpu_has_room_for_cuda_and_a_tenth_more():
    found = Needs(1, {16: 14e9}, 1, 1, 1, 1, None)
    assert found.gpu(16, 0.3e9) == "20"  # 15.3 GB are more than nine tenths of 16
    assert Needs(1, {16: 200e9}, 1, 1, 1, 1, None).gpu(16, 0) == "several"


@pytest.mark.parametrize(
    "words, said",
    [
        (["qwen2.5-3b"], "unknown size 'qwen2.5-3b' (did you mean 'qwen2.5-vl-3b'?)"),
        (["7b", "--batch-size", "0"], "'0' is no number above 0"),
        (["7b", "--tflops", "fast"], "'fast' is no number above 0"),
    ],
)
def test_bad_input_is_one_sentence(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        needs.main(words)
    assert said in f"{stop.value.code} {capsys.readouterr().err}"


def test_the_playground_has_a_name(capsys):
    needs.main(["playground"])
    assert "| `playground` |" in capsys.readouterr().out
