"""The memory of a recipe follows from the sizes of the model."""

from dataclasses import replace

import pytest
import torch

from llava.model import LlavaLlamaForCausalLM
from llava.model.language_model.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from llava.pruning.glimpseprune_modules import Glimpse, GlimpseConfig
from llava.train.memory import Shape, activations, estimate, main, read_shape
from tests.golden_data import GOLDEN, SHIPPED


def test_parameters_are_counted_as_the_model_has_them():
    model = LlavaLlamaForCausalLM.from_pretrained(GOLDEN / "tiny-llava-v1.5")
    shape = read_shape(str(GOLDEN / "tiny-llava-v1.5"))
    counts = {name: p.numel() for name, p in model.named_parameters() if "vision_tower" not in name}
    projector = sum(n for name, n in counts.items() if "mm_projector" in name)
    assert shape.projector == projector
    assert shape.language_model == sum(counts.values()) - projector
    assert read_shape("7b").language_model == 6_738_415_616
    assert read_shape("13b").language_model == 13_015_864_320


def test_every_layer_more_keeps_its_inputs_and_nothing_else():
    shape = read_shape("7b")
    deeper = replace(shape, num_hidden_layers=shape.num_hidden_layers + 3)
    kept = [activations(own, "all", batch=2, length=100, twig_layers=0) for own in (deeper, shape)]
    assert kept[0] - kept[1] == 3 * 2 * 200 * 4096


def test_parameters_of_qwen2_5_vl_are_counted_as_the_model_has_them():
    folder = SHIPPED / "tiny-qwen2.5-vl-cut"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    shape, total = read_shape(str(folder)), sum(p.numel() for p in model.parameters())
    assert shape.projector == sum(p.numel() for p in model.visual.merger.parameters())
    assert shape.tower + shape.projector == sum(p.numel() for p in model.visual.parameters())
    assert shape.language_model == total - shape.tower - shape.projector
    for size, count in (("3b", 3_754_622_976), ("7b", 8_292_166_656)):
        shape = read_shape(f"qwen2.5-vl-{size}")
        assert shape.language_model + shape.tower + shape.projector == count


def test_grouped_keys_are_counted():
    shape = Shape(4096, 14336, 32, num_key_value_heads=8)  # Mistral 7B
    assert shape.language_model == 7_241_732_096


def test_adapters_are_counted_as_peft_makes_them():
    from peft import LoraConfig, get_peft_model

    model = LlavaLlamaForCausalLM.from_pretrained(GOLDEN / "tiny-llava-v1.5")
    targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    made = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert read_shape(str(GOLDEN / "tiny-llava-v1.5")).lora(4) == made


def test_the_parts_of_a_glimpse_are_counted_as_it_has_them():
    for name, width, heads, depth, tower in (
        ("7b", 4096, 32, 32, 1024),
        ("qwen2.5-vl-3b", 2048, 16, 36, 1280),
    ):
        with torch.device("meta"):
            layers = dict(le_layers=range(depth), selected_layers=(1,), reduce_layer=1)
            config = GlimpseConfig(
                width, heads, tower, selected_visual_layers=(4, 3, 2, 1), **layers
            )
            glimpse = Glimpse(config)
        assert read_shape(name).glimpse == sum(p.numel() for p in glimpse.parameters())


def test_the_parameters_of_twigs_are_those_of_the_paper():
    shape = read_shape("7b")
    counts = {"twig": 738_226_176, "gated twig": 771_780_608, "gates": 33_554_432}
    for trained, count in counts.items():
        assert estimate(shape, trained, 0).gradients == pytest.approx(4 * count / 1e9)
    one, all_of_it = (estimate(shape, trained, 0, batch=1) for trained in ("gates", "gated twig"))
    frozen = shape.language_model + shape.projector + shape.tower
    assert all_of_it.weights == pytest.approx((2 * frozen + 4 * counts["gated twig"]) / 1e9)
    frozen += counts["twig"]  # which stays as it is
    assert one.weights == pytest.approx((2 * frozen + 4 * counts["gates"]) / 1e9)
    assert 0 < one.activations < 10  # of 32 selections side by side


def test_zero_shares_what_it_says_it_shares():
    shape = read_shape("7b")
    count = shape.language_model + shape.projector
    two, three = (estimate(shape, "all", zero, gpus=8) for zero in (2, 3))
    assert two.optimizer == three.optimizer == pytest.approx(12 * count / 8 / 1e9)
    assert two.gradients == three.gradients == pytest.approx(2 * count / 8 / 1e9)
    assert two.weights == pytest.approx(2 * (count + 303_507_456) / 1e9)
    assert three.weights < two.weights / 4
    alone = estimate(shape, "all", 0, gpus=8)
    assert alone.weights + alone.gradients + alone.optimizer > 16 * count / 1e9
    offload = estimate(shape, "all", 3, gpus=8, offload=True)
    assert offload.optimizer == 0 and offload.total < three.total
    assert offload.on_cpu > three.optimizer
    assert estimate(shape, "lora", 3).total < three.total
    assert estimate(shape, "all", 3, batch=8).activations == pytest.approx(three.activations / 2)


def test_what_is_unknown_is_named(capsys):
    with pytest.raises(ValueError, match="zero 1 is not a stage"):
        estimate(read_shape("7b"), "all", 1)
    with pytest.raises(ValueError, match="trained 'head' is unknown"):
        estimate(read_shape("7b"), "head", 2)
    with pytest.raises(SystemExit):
        main(["70b"])
    assert "neither a folder with a config.json nor one of 7b, 13b" in capsys.readouterr().err


def test_the_table_fits_the_machines_that_the_recipes_name(capsys):
    main(["13b"])
    rows = capsys.readouterr().out.splitlines()[1:]
    totals = {row[:34].strip(): float(row.split()[-2]) for row in rows}
    assert len(totals) == 8 and all(total < 80 for total in totals.values())
    main(["qwen2.5-vl-7b"])
    rows = capsys.readouterr().out.splitlines()[1:]
    totals = {row[:34].strip(): float(row.split()[-2]) for row in rows}
    assert len(totals) == 4 and all(total < 72 for total in totals.values())
    assert totals["train_glimpse (batch 1)"] < 24
    main(["7b", "--gpus", "4"])
    row = next(r for r in capsys.readouterr().out.splitlines() if r.startswith("train_twig"))
    assert float(row.split()[-2]) < 40
