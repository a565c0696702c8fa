"""Trained scorers: their files, where they compute, and what becomes of answers."""

import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from llava.eval.answering.settings import differences, settings_of
from llava.pruning import build_pruner, trace_pruning
from llava.pruning.scorer import read_scorer
from llava.pruning.testing import MethodContract, OwnGridsContract
from llava.pruning.testing.tiny import SIDE, TINY, pad_batch
from tests.paths import ROOT

WIDTH = TINY["hidden_size"]


def network(*behind: nn.Module, width: int = WIDTH, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, 1), *behind)


def write(path: Path, made: nn.Sequential | dict, **metadata: str) -> str:
    tensors = made if isinstance(made, dict) else made.state_dict()
    save_file(tensors, path, metadata or None)
    return str(path)


@pytest.fixture
def scorer(tmp_path):
    return write(tmp_path / "scorer.safetensors", network())


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "between"),
    [
        ("gelu", nn.GELU()),
        ("gelu_tanh", nn.GELU(approximate="tanh")),
        ("relu", nn.ReLU()),
        ("silu", nn.SiLU()),
        ("tanh", nn.Tanh()),
        ("sigmoid", nn.Sigmoid()),
    ],
)
def test_a_file_is_the_network_that_it_was_written_from(tmp_path, name, between):
    trained = network(nn.Sigmoid())
    trained[1] = between
    path = write(tmp_path / "s.safetensors", trained, activation=name, output_activation="sigmoid")
    tokens = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(
        read_scorer(path, "idpruner", WIDTH)(tokens), trained(tokens)[..., 0]
    )


def test_gelu_is_meant_where_no_activation_is_named_and_folders_hold_the_file(tmp_path):
    trained, tokens = network(), torch.randn(3, WIDTH)
    write(tmp_path / "model.safetensors", trained)
    found = read_scorer(str(tmp_path), "idpruner", WIDTH)
    torch.testing.assert_close(found(tokens), trained(tokens)[..., 0])
    assert not any(p.requires_grad for p in found.parameters())


def test_layers_may_lack_a_bias_stand_alone_or_have_more_than_an_activation_between(tmp_path):
    tokens = torch.randn(3, WIDTH)
    for trained in (
        nn.Sequential(nn.Linear(WIDTH, 1, bias=False)),
        nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, 1)),
        nn.Sequential(nn.Linear(WIDTH, 4), nn.GELU(), nn.Dropout(), nn.Linear(4, 1)).eval(),
    ):
        path = write(tmp_path / "s.safetensors", trained)
        found = read_scorer(path, "idpruner", WIDTH)(tokens)
        torch.testing.assert_close(found, trained(tokens)[..., 0])


ONE = torch.ones(1, WIDTH)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (
            {"0.weight": torch.ones(1, WIDTH + 2)},
            {},
            f"scores tokens of width {WIDTH + 2}, but .* width {WIDTH}",
        ),
        ({"0.weight": torch.ones(3, WIDTH)}, {}, "its last layer gives 3 numbers for a token"),
        (
            {"0.weight": torch.ones(4, WIDTH), "2.weight": torch.ones(1, 5)},
            {},
            "layer 0 gives 4 numbers, layer 2 takes 5",
        ),
        ({"score.weight": ONE}, {}, "it holds score.weight, expected a stack of linear layers"),
        ({"0.weight": ONE, "2.bias": torch.ones(1)}, {}, "it holds 2.bias, expected a stack"),
        ({"0.weight": torch.ones(WIDTH)}, {}, r"0.weight has shape \(\d+,\), expected \(outputs"),
        ({"0.weight": ONE, "0.bias": torch.ones(2)}, {}, "0.bias has shape"),
        ({"0.weight": ONE.int()}, {}, "int32 numbers, expected floating-point"),
        ({"0.weight": ONE * torch.nan}, {}, "0.weight holds numbers that are not finite"),
        ({"0.weight": ONE}, {"activation": "swish"}, "unknown activation 'swish', choose from"),
        ({}, {}, "it is empty"),
    ],
)
def test_a_file_that_is_none_or_does_not_fit_is_refused_in_one_sentence(
    model, tmp_path, tensors, metadata, message
):
    path = write(tmp_path / "s.safetensors", tensors, **metadata)
    with pytest.raises(ValueError, match=message) as error:
        model.pruner = build_pruner("idpruner", scorer=path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file_of_a_scorer_is_refused(model, tmp_path):
    (tmp_path / "other.bin").write_bytes(b"weights")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a .safetensors file"):
        model.pruner = build_pruner("idpruner", scorer=str(tmp_path / "other.bin"))
    with pytest.raises(FileNotFoundError, match="empty holds no scorer"):
        model.pruner = build_pruner("idpruner", scorer=str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="missing"):
        model.pruner = build_pruner("idpruner", scorer=str(tmp_path / "missing"))
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"pruning_method": "twigvlm"}))
    with pytest.raises(ValueError, match="a trained part of 'twigvlm', not of 'idpruner'"):
        model.pruner = build_pruner("idpruner", scorer=str(tmp_path / "empty"))


# --- choice ---------------------------------------------------------------------------------------


def kept(model, pruner, sample, **options) -> list[int]:
    model.pruner, prompt = pruner, sample(4, "image", 5)
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, max_new_tokens=1, **options)
    return trace.visual_positions[0].tolist()


def test_the_scorer_says_what_is_important(model, scorer, sample):
    seen = []

    class Watched(type(build_pruner("idpruner"))):
        def importance(self, vision, rows):
            assert vision.salience is None, "attention is not asked for"
            seen.append((vision.features[rows], super().importance(vision, rows)))
            return seen[-1][1]

    tokens = kept(model, Watched(10, mmr_lambda=1.0, scorer=scorer), sample)
    features, importance = seen[0]
    torch.testing.assert_close(importance, network()(features)[..., 0])
    assert tokens == sorted(importance[0].topk(10).indices.tolist())
    by_attention = build_pruner("idpruner", visual_token_num=10, mmr_lambda=1.0)
    assert tokens != kept(model, by_attention, sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_importance_is_computed_in_fp32_whatever_the_model_is_in(make_model, scorer, dtype):
    model = make_model().to(dtype)
    model.pruner = pruner = build_pruner("idpruner", visual_token_num=10, scorer=scorer)
    tokens = torch.randn(2, 5, WIDTH).to(dtype)
    expected = network()(tokens.float())[..., 0]
    found = pruner.module(tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    model.to(dtype)  # of a model that is cast later its weights are, too
    assert pruner.module(tokens).dtype == torch.float32


def test_a_batch_of_crops_is_what_its_images_are_alone(anyres_model, scorer, sample):
    anyres_model.pruner = build_pruner("idpruner", visual_token_num=30, scorer=scorer)
    images = [
        torch.randn(crops, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(crops))
        for crops in (5, 3)
    ]
    sizes = [(2 * SIDE, 2 * SIDE), (2 * SIDE, SIDE)]
    prompts = [sample(4, "image", 5), sample(2, "image", 3)]

    def positions(numbers: list[int]) -> list[list[int]]:
        ids, mask = pad_batch([prompts[n].ids for n in numbers])
        with trace_pruning(anyres_model) as trace:
            anyres_model.generate(
                ids,
                attention_mask=mask,
                images=[images[n] for n in numbers],
                image_sizes=[sizes[n] for n in numbers],
                max_new_tokens=1,
            )
        return [own.tolist() for own in trace.visual_positions]

    rated = []
    scored = anyres_model.pruner.module.register_forward_hook
    hook = scored(lambda module, given, scores: rated.append(len(scores)))
    together = positions([0, 1])
    hook.remove()
    assert sorted(rated) == [3, 5], "each crop is rated once"
    assert together == positions([0]) + positions([1])


def test_a_wrapper_and_a_method_behind_it_work_with_a_scorer(model, scorer, sample):
    wrapped = build_pruner("restore+idpruner", visual_token_num=10, idpruner_scorer=scorer)
    assert len(kept(model, wrapped, sample)) == 10
    row = build_pruner(
        "idpruner+fastv",
        idpruner_visual_token_num=20,
        fastv_visual_token_num=10,
        idpruner_scorer=scorer,
    )
    assert len(kept(model, row, sample)) == 20


FOLDER = tempfile.TemporaryDirectory()
WRITTEN = write(Path(FOLDER.name) / "scorer.safetensors", network())


class TestIDPrunerWithAScorer(MethodContract):
    method, options = "idpruner", {"scorer": WRITTEN}


class TestIDPrunerWithAScorerOnOwnGrids(OwnGridsContract):
    method, options = "idpruner", {"scorer": WRITTEN}


# --- answers --------------------------------------------------------------------------------------


def test_answers_of_another_scorer_are_not_continued(tmp_path):
    class Args:
        model_path, model_name, dtype = "somewhere", "model", "float32"

    def now(**options) -> dict:
        args = Args()
        args.model_path = str(tmp_path / "model")
        return settings_of(args, build_pruner("idpruner", **options))

    (tmp_path / "model").mkdir()
    first = write(tmp_path / "first.safetensors", network())
    other = write(tmp_path / "other.safetensors", network(seed=1))
    before = now(scorer=first)
    assert first in before["pruner"] and before == now(scorer=first)
    assert "trained_parts" not in now()
    assert differences(before, now(scorer=other)) and differences(before, now())
    write(Path(first), network(seed=2))  # trained once more, into the same file
    (said,) = differences(before, now(scorer=first))
    assert said.startswith("trained_parts was")


def test_the_page_shows_how_to_write_a_file(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "Methods.md").read_text(encoding="utf-8")
    section = re.search(r"^### idpruner\n(.*?)(?=^### )", page, re.S | re.M)[1]
    (written,) = (
        text for text in re.findall(r"```python\n(.*?)```", section, re.S) if "save_" in text
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(written, names)
    found = read_scorer(names["pruner"].scorer, "idpruner", names["width"])
    tokens = torch.randn(3, names["width"])
    torch.testing.assert_close(found(tokens), names["trained"](tokens)[..., 0])
