"""The playground's Qwen2.5-VL: what its training computes is what the loaded model computes."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from llava.eval.benchmarks.refcoco import to_padded_square
from llava.front_end import FrontEnd
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.qwen2_5_vl_images import Qwen2_5_VLImageProcessor
from playground import (
    decoder_text,
    questions,
    qwen_files,
    qwen_model,
    qwen_tower,
    scenes,
    train_qwen,
)
from playground.tower_model import PATCH

GRID = (8, 9)
SIZE = (GRID[1] * PATCH, GRID[0] * PATCH)
#: a scene with several things on a small picture
SEED = 3
LLAVA_WEIGHTS = qwen_tower.DECODER / "model.safetensors"


def picture(scene):
    return Image.fromarray(scenes.render(scene))


@pytest.fixture(scope="module")
def parts():
    """A decoder of two layers and a tower of two, both as they start, and a folder with them."""
    torch.manual_seed(0)
    decoder = qwen_model.QwenDecoder(layers=2)
    qwen_model.read_places(decoder)
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config = qwen_tower.vision_config(**sizes, fullatt_block_indexes=(1,))
    return decoder, qwen_tower.TrainedTower(config).visual


@pytest.fixture(scope="module")
def loaded(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2.5-vl-playground")
    train_qwen.write(*parts, folder)
    tokenizer, model, processor, _ = load_pretrained_model(
        str(folder), None, "", device="cpu", torch_dtype=torch.float32
    )
    processor.min_pixels = processor.max_pixels = 4 * SIZE[0] * SIZE[1]
    return FrontEnd(tokenizer, model, processor, "qwen2_5_vl")


# Scenes of any size --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, (448, 252), (252, 448)])
def test_scenes_keep_inside_pictures_of_any_size(size):
    for seed in range(5):
        scene = scenes.make_scene(seed, size)
        assert scenes.render(scene).shape == (size[1], size[0], 3)
        for item in (*scene.things, *scene.signs):
            left, top, right, bottom = item.box
            assert 0 < left < right < size[0] and 0 < top < bottom < size[1]


def test_boxes_are_shares_of_the_padded_square_that_the_scorer_expects():
    scene = scenes.make_scene(SEED, (448, 252))
    box = scene.things[0].box
    assert questions.box_shares(scene, box) == pytest.approx(to_padded_square(box, 448, 252))


# Files ---------------------------------------------------------------------------------------


def test_words_keep_the_ids_they_have_in_the_playgrounds_llava():
    words = qwen_files.wording()
    for question in questions.ask(scenes.make_scene(SEED), np.random.default_rng(0)):
        ids, asked = words.turn(question)
        old, old_asked = decoder_text.LLAVA.turn(question)
        assert ids[asked:-1] == old[old_asked:-1]
        assert ids[-1] == qwen_files.mark_id("<|im_end|>")


def test_training_reads_the_ids_of_the_real_prompt(loaded):
    words = qwen_files.wording()
    for question in questions.ask(scenes.make_scene(SEED), np.random.default_rng(0)):
        ids, asked = words.turn(question)
        prompt = loaded.encode(loaded.prompt(question.text, num_images=1))
        assert prompt.tolist() == [*words.prefix, -200, *ids[:asked]]
        assert loaded.decode(torch.tensor([ids[asked:]])) == [question.answer]


def test_pictures_of_any_size_get_about_as_many_tokens():
    settings = {"min_pixels": qwen_files.MIN_PIXELS, "max_pixels": qwen_files.MAX_PIXELS}
    processor = Qwen2_5_VLImageProcessor(**settings)
    for size in ((336, 336), (90, 120), (1600, 900)):
        h, w, *_ = processor.process_images([Image.new("RGB", size)])[0].shape
        assert 500 < h * w < 650
    for rows, columns in qwen_tower.LARGE_GRIDS:
        image = Image.new("RGB", (columns * PATCH, rows * PATCH))
        assert processor.process_images([image])[0].shape[:2] == (rows, columns)


# Model ---------------------------------------------------------------------------------------


def test_the_tower_in_training_gives_the_tokens_of_the_loaded_tower(parts, loaded):
    scene = scenes.make_scene(SEED, SIZE)
    pixels = loaded.image_processor.process_images([picture(scene)])
    patches = torch.from_numpy(qwen_tower.blocks(scenes.render(scene)))[None]
    with torch.no_grad():
        trained = qwen_tower.encode(parts[1].float(), patches, GRID)[0]
        real = loaded.model.visual(pixels)[0]
    assert pixels[0].shape[:2] == GRID
    # the loaded weights went through bf16
    torch.testing.assert_close(trained, real, rtol=0, atol=0.02 * float(real.abs().max()))


def test_the_decoder_in_training_gives_the_logits_of_the_loaded_model(parts, loaded):
    scene, words = scenes.make_scene(SEED, SIZE), qwen_files.wording()
    question = questions.existence(scene, np.random.default_rng(0))
    ids, _ = words.turn(question)
    decoder = loaded.model
    inputs = torch.tensor([[*words.prefix, -200, *ids]])
    pixels = loaded.image_processor.process_images([picture(scene)])
    seen = torch.zeros(1)
    with torch.no_grad():
        real = decoder(inputs, images=pixels).logits[:, -len(ids) :]
        seen = decoder.visual(pixels)[0][None]
        places = train_qwen.places_of(torch.arange(GRID[0] * GRID[1]), GRID)[None]
        copy = qwen_model.QwenDecoder(layers=2)
        copy.load_state_dict({n: v for n, v in decoder.state_dict().items() if "visual" not in n})
        states, _, _ = copy(seen, places, max(GRID), [torch.tensor([[ids]])])
        trained = copy.lm_head(states)
    # training turns by angles in bf16
    torch.testing.assert_close(trained, real, rtol=0, atol=0.03 * float(real.abs().max()))


def test_layer_0_starts_with_codes_of_rows_and_columns():
    torch.manual_seed(0)
    decoder = qwen_model.QwenDecoder(layers=1)
    qwen_model.read_places(decoder)
    seen = 0.1 * torch.randn(1, 24 * 24, qwen_model.WIDTH)
    places = train_qwen.places_of(torch.arange(24 * 24), (24, 24))[None]
    with torch.no_grad():
        placed, _ = decoder.place(seen, places, 24, [torch.zeros(1, 1, 2, dtype=torch.long)])
    codes = (placed - seen)[0] @ qwen_model.mark_directions()[3:].T
    codes = codes.unflatten(0, (24, 24))
    for (axis, _, middle), code in zip(qwen_model.READERS, codes.unbind(-1), strict=True):
        along = code.mean(2 - axis)  # the mean over the other axis
        rising = along[: middle + 8]
        assert rising.diff().min() > -0.05 and rising[-1] - rising[0] > 0.5
        assert code.std(2 - axis).mean() < 0.3


def test_the_decoder_starts_with_the_layers_of_the_playgrounds_llava():
    weights, decoder = load_file(LLAVA_WEIGHTS), qwen_model.QwenDecoder()
    qwen_model.start_from_llava(decoder, weights)
    own = decoder.state_dict()
    for part in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
        old, new = weights[f"model.layers.5.{part}"], own[f"model.layers.6.{part}"]
        assert torch.equal(old.float(), new)
    row = qwen_files.encode(" red")[0]
    assert torch.equal(own["lm_head.weight"][row], weights["lm_head.weight"][row].float())


# Training ------------------------------------------------------------------------------------


def test_tokens_to_learn_tell_edges_from_the_middle_of_the_token():
    scene = scenes.make_scene(SEED, SIZE)
    found = qwen_tower.targets(scene)
    thing = scene.things[0]
    left, top, right, bottom = thing.box
    row, column = (top + bottom) // 2 // PATCH, (left + right) // 2 // PATCH
    code = found["code"][row * GRID[1] + column][qwen_tower.EDGES] / qwen_tower.CODE_SCALE
    middle = np.array([column, row, column, row]) * PATCH + PATCH / 2
    np.testing.assert_allclose(code * qwen_tower.NEAR + middle, thing.box, atol=1e-3)


def test_no_loss_of_the_tower_pulls_away_from_the_wanted_tokens():
    words = qwen_tower.words(load_file(LLAVA_WEIGHTS)["model.embed_tokens.weight"])
    found = qwen_tower.targets(scenes.make_scene(SEED, SIZE))
    data = qwen_tower.tensors({name: value[None] for name, value in found.items()})
    want = qwen_tower.wanted_tokens(data, words)
    logits = torch.zeros(*want.shape[:2], sum(qwen_tower.CLASSES.values()))
    losses = qwen_tower.losses((want, logits), data, words)
    assert losses["tokens"] == losses["edges"] == 0


def test_a_step_of_the_last_stage_trains_tower_and_decoder(monkeypatch, tmp_path):
    scene = scenes.make_scene(SEED, SIZE)
    monkeypatch.setattr(train_qwen, "SQUARE", GRID)
    monkeypatch.setattr(train_qwen.scenes, "make_scene", lambda *_: scene)
    torch.manual_seed(0)
    args = Namespace(state=tmp_path)
    with pytest.raises(FileNotFoundError, match="run the stage places first"):
        train_qwen.Answers(args)
    torch.save({"model": qwen_tower.TrainedTower().state_dict()}, tmp_path / "tower_state.pt")
    layer = nn.ModuleList([qwen_model.QwenDecoder().model.layers[0]])
    torch.save({"trained": layer.state_dict()}, tmp_path / "places_state.pt")
    before = train_qwen.Answers(args)
    torch.save({"trained": before.trained.state_dict()}, tmp_path / "answers_state.pt")
    stage = train_qwen.Whole(args)
    stage.size, stage.keep = 1, 20
    sum(stage.loss(2).values()).backward()
    for module in (stage.tower.visual.merger, stage.decoder.model.layers[0], stage.decoder.lm_head):
        assert all(p.grad.abs().sum() > 0 for p in module.parameters() if p.ndim == 2)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_training_continues_where_it_stopped(tmp_path):
    def stage():
        linear = nn.Linear(2, 2)
        found = SimpleNamespace(name="some", rate=0.01, trained=nn.ModuleList([linear]))
        found.loss = lambda step: {"loss": linear(torch.ones(2)).square().sum()}
        found.scores = lambda: {}
        return found

    first, second = stage(), stage()
    train_qwen.train(first, tmp_path, 0.003, 10**6)
    done = torch.load(tmp_path / "some_state.pt", weights_only=True)
    train_qwen.train(second, tmp_path, 0.003, 10**6)  # no time left: it only reads the state
    assert done["step"] > 0
    for one, other in zip(first.trained.parameters(), second.trained.parameters(), strict=True):
        assert torch.equal(one, other)
