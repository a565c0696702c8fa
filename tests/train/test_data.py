"""Batches, loss, gradients, sample order and optimizer groups, against recorded ones."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, CLIPImageProcessor

from llava.conversation import conv_templates
from llava.model import LlavaLlamaForCausalLM
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.model_setup import find_all_linear_names
from llava.train.optimizer import parameter_groups
from llava.train.sample_images import preprocess_multimodal
from llava.train.sampler import (
    EpochRandomSampler,
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
    whole_steps,
)
from tests.golden_data import GOLDEN, golden_json

RECORDED = golden_json("llava-base/train_data.json")
ARRAYS = np.load(GOLDEN / "llava-base/train_batch.npz")
CHECKPOINT = GOLDEN / "tiny-llava-v1.5"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT, use_fast=False, model_max_length=2048)


@pytest.fixture(scope="module")
def dataset(tokenizer, tmp_path_factory):
    return make_dataset(RECORDED["data"], tokenizer, tmp_path_factory.mktemp("data"))


def make_dataset(samples, tokenizer, folder, **options):
    path = folder / "data.json"
    path.write_text(json.dumps(samples))
    data_args = SimpleNamespace(
        image_folder=str(GOLDEN / RECORDED["image_folder"]),
        image_processor=CLIPImageProcessor.from_pretrained(GOLDEN / "tiny-clip-vit-l14-336"),
        image_aspect_ratio="pad",
        is_multimodal=True,
    )
    data_args.__dict__.update(options)
    return LazySupervisedDataset(str(path), tokenizer, data_args)


@pytest.fixture(scope="module")
def batch(dataset, tokenizer):
    return DataCollatorForSupervisedDataset(tokenizer)([dataset[i] for i in range(len(dataset))])


@pytest.fixture(scope="module")
def shared_model():
    model = LlavaLlamaForCausalLM.from_pretrained(CHECKPOINT)
    model.get_vision_tower().load_model()
    return model.train()


def test_lengths_count_words_and_tell_modalities_apart(dataset):
    assert len(dataset) == RECORDED["len"]
    assert dataset.lengths == RECORDED["lengths"]
    assert dataset.modality_lengths == RECORDED["modality_lengths"]
    assert sorted(dataset[0]) == RECORDED["item_keys"]


def test_a_batch_is_the_recorded_one(batch, dataset, tokenizer, tmp_path):
    for key in ("input_ids", "labels", "attention_mask"):
        assert batch[key].tolist() == ARRAYS[f"batch_{key}"].tolist()
    assert list(batch["images"].shape) == ARRAYS["batch_images_shape"].tolist()
    assert not batch["images"][1].any()
    assert np.allclose(
        batch["images"][:, :, 12::48, 12::48], ARRAYS["batch_images_sampled_pad"], atol=1e-4
    )
    square = make_dataset(RECORDED["data"], tokenizer, tmp_path, image_aspect_ratio="square")
    pixels = torch.stack([square[i]["image"] for i in range(len(square))])[:, :, 12::48, 12::48]
    assert np.allclose(pixels, ARRAYS["batch_images_sampled_square"], atol=1e-4)


def test_an_unknown_token_in_the_text_is_not_padding(tokenizer):
    unknown = tokenizer.unk_token_id
    assert unknown == tokenizer.pad_token_id
    item = {"input_ids": torch.tensor([1, unknown, 5]), "labels": torch.tensor([-100, 7, 5])}
    short = {"input_ids": torch.tensor([1]), "labels": torch.tensor([-100])}
    batch = DataCollatorForSupervisedDataset(tokenizer)([item, short])
    assert batch["attention_mask"].tolist() == [[True] * 3, [True, False, False]]


def test_anyres_items_carry_their_tiles_and_size(tokenizer, tmp_path):
    pinpoints = [[336, 672], [672, 336], [672, 672]]
    dataset = make_dataset(
        RECORDED["data"], tokenizer, tmp_path,
        image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    batch = DataCollatorForSupervisedDataset(tokenizer)([dataset[0], dataset[1]])
    assert [tuple(image.shape) for image in batch["images"]] == [(5, 3, 336, 336), (3, 336, 336)]
    assert batch["image_sizes"] == [(640, 360), (336, 336)]


def test_image_marks_are_collected_at_the_front_of_their_message():
    messages = [{"from": "human", "value": "a <image> b <image>"}, {"from": "gpt", "value": "c"}]
    values = [m["value"] for m in preprocess_multimodal(messages, conv_templates["v1"])]
    assert values == ["<image>\na  b", "c"]
    marked = preprocess_multimodal(messages, conv_templates["v1_mmtag"], mm_use_im_start_end=True)
    assert marked[0]["value"] == "<Image><im_start><image><im_end></Image>\na  b"


def test_an_image_that_cannot_be_read_is_named(tokenizer, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    samples = [{**RECORDED["data"][0], "id": "x7", "image": str(tmp_path / "broken.png")}]
    dataset = make_dataset(samples, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="data.json, sample 0 .id 'x7'.*broken.png"):
        dataset[0]


@pytest.mark.parametrize("case", [0, 1])
def test_loss_and_gradients_are_the_recorded_ones(shared_model, batch, case):
    recorded = RECORDED["loss"][case]
    model = shared_model
    only_projector = recorded["mode"] == "projector"
    model.requires_grad_(not only_projector)
    model.get_vision_tower().requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    model.zero_grad()
    rows = {key: value[:2] for key, value in batch.items()}
    loss = model(**rows).loss
    assert loss.item() == pytest.approx(recorded["loss"], abs=2e-5)
    loss.backward()
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    assert len(norms) == recorded["n_params_with_grad"]
    for name, norm in recorded["grad_norms"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-3), name
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert total == pytest.approx(recorded["grad_norm_total"], rel=1e-3)
    bias = model.get_model().mm_projector[0].bias.grad.numpy()
    expected = ARRAYS[f"image_plus_text_{recorded['mode']}_proj0_bias_grad"]
    assert np.allclose(bias, expected, atol=1e-4)
    model.requires_grad_(True)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "rows"), [(2, [2, 3]), (3, [0, 1, 2, 3])])
def test_loss_of_other_batches_is_the_recorded_one(shared_model, batch, case, rows):
    with torch.no_grad():
        loss = shared_model(**{key: value[rows] for key, value in batch.items()}).loss
    assert loss.item() == pytest.approx(RECORDED["loss"][case]["loss"], abs=2e-5)


def test_even_chunks_are_the_recorded_ones():
    for case in RECORDED["sampler"]["split_to_even_chunks"]:
        chunks = split_to_even_chunks(case["indices"], case["lengths"], case["num_chunks"])
        assert chunks == case["out"]


@pytest.mark.parametrize("case", RECORDED["sampler"]["cases"], ids=lambda c: f"seed{c['seed']}")
def test_sample_orders_are_the_recorded_ones(case):
    lengths = RECORDED["sampler"]["lengths"]
    signed = RECORDED["sampler"]["modality_lengths"]
    size = case["batch_size"], case["world_size"]

    def generator():
        torch.manual_seed(case["seed"])
        return torch.Generator().manual_seed(case["seed"])

    order = get_length_grouped_indices(lengths, *size, generator=generator())
    assert order == case["length_grouped"]
    order = get_modality_length_grouped_indices(signed, *size, generator=generator())
    assert order == case["modality_grouped_gen_and_global_seed"]
    generator()
    sampler = LengthGroupedSampler(*size, lengths=signed, group_by_modality=True)
    assert list(sampler) == case["sampler_modality_global_seed"]
    generator()
    assert list(LengthGroupedSampler(*size, lengths)) == case["sampler_plain_global_seed"]


def test_a_seeded_order_depends_on_seed_and_epoch_only():
    signed = RECORDED["sampler"]["modality_lengths"]
    for sampler in (
        LengthGroupedSampler(2, 2, signed, group_by_modality=True, seed=3),
        EpochRandomSampler(len(signed), seed=3),
    ):
        first = list(sampler)
        torch.rand(5)
        assert list(sampler) == first and sorted(first) == list(range(len(signed)))
        sampler.start_epoch(1)
        assert list(sampler) != first


@pytest.mark.parametrize(
    ("arguments", "steps", "taken"),
    [
        ((12, 4, 1), 3, 12),
        ((10, 4, 1), 3, 10),  # the last step has two samples
        ((10, 1, 4), 2, 8),
        ((11, 2, 3), 2, 11),
        ((3, 1, 4), 1, 4),
        ((3, 2, 2), 1, 3),
        ((10, 4, 1, True), 2, 8),
        ((3, 4, 1, True), 1, 4),
    ],
)
def test_an_epoch_is_whole_steps_as_many_as_transformers_counts(arguments, steps, taken):
    assert whole_steps(*arguments) == (steps, taken)
    num_samples, batch, accumulation, *drop_last = arguments
    assert -(-taken // batch) == steps * accumulation
    loader = DataLoader(range(num_samples), batch, drop_last=bool(drop_last))
    assert steps == max(1, len(loader) // accumulation)


@pytest.mark.parametrize("taken", [8, 10, 25])
def test_every_sample_may_be_left_out_of_an_epoch_or_come_again(taken):
    signed = [*range(1, 10), -4]  # one text, which would always stand behind the whole batches
    for sampler in (
        LengthGroupedSampler(2, 2, signed, group_by_modality=True, seed=3, taken=taken),
        EpochRandomSampler(len(signed), seed=3, taken=taken),
    ):
        often = Counter()
        for epoch in range(20):
            sampler.start_epoch(epoch)
            order = list(sampler)
            assert len(order) == len(sampler) == taken
            counts = Counter({i: 0 for i in range(len(signed))}) | Counter(order)
            counts = [counts[i] for i in range(len(signed))]
            assert max(counts) - min(counts) <= 1
            often.update(order)
        assert set(often) == set(range(len(signed)))


def test_several_processes_share_the_order_of_one():
    signed = [*range(1, 33), *range(-32, 0)]
    for sampler in (
        LengthGroupedSampler(1, 2, signed, group_by_modality=True, seed=3),
        EpochRandomSampler(len(signed), seed=3),
    ):
        loader = DataLoader(range(len(signed)), 1, sampler=sampler)
        shards = [
            prepare_data_loader(loader, num_processes=2, process_index=i, put_on_device=False)
            for i in range(2)
        ]
        for epoch in (1, 0, 1):
            sampler.start_epoch(epoch)
            order = [batch.item() for pair in zip(*shards, strict=True) for batch in pair]
            assert order == list(sampler)


def test_a_sample_without_words_has_no_modality():
    with pytest.raises(ValueError, match="length 0"):
        get_modality_length_grouped_indices([3, 0, -1], 1, 1)


@pytest.mark.parametrize(
    ("name", "lr"), [("mm_projector_lr None", None), ("mm_projector_lr 2e-5", 2e-5)]
)
def test_optimizer_groups_are_the_recorded_ones(shared_model, name, lr):
    names = {id(p): n for n, p in shared_model.named_parameters()}
    shared_model.get_vision_tower().requires_grad_(False)
    groups = parameter_groups(shared_model, weight_decay=0.1, mm_projector_lr=lr)
    for group, recorded in zip(groups, RECORDED["optimizer_groups"][name], strict=True):
        members = [names[id(p)] for p in group["params"]]
        assert len(members) == recorded["n"]
        assert group["weight_decay"] == recorded["weight_decay"]
        assert group.get("lr") == recorded["lr"]
        assert set(recorded["first"]) <= set(members)
        assert ("lm_head.weight" in members) == recorded["has_lm_head"]
        assert [m for m in members if "mm_projector" in m] == recorded["projector"]
        assert sum("norm" in m for m in members) == recorded["n_norm"]
        assert sum("bias" in m for m in members) == recorded["n_bias"]


def test_lora_adapts_the_linear_layers_of_the_decoder(shared_model):
    assert find_all_linear_names(shared_model) == RECORDED["find_all_linear_names"]


@pytest.mark.parametrize("recorded", RECORDED["initialize_vision_tokenizer"])
def test_new_marker_tokens_start_as_recorded(recorded):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, use_fast=False)
    model = LlavaLlamaForCausalLM.from_pretrained(CHECKPOINT)
    flags = {k: v for k, v in recorded.items() if k.startswith(("mm_use", "tune"))}
    before = model.config.vocab_size
    model.initialize_vision_tokenizer(
        SimpleNamespace(pretrain_mm_mlp_adapter=None, **flags), tokenizer
    )
    tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert [before, len(tables[0])] == recorded["vocab"]
    for token, number in recorded["ids"].items():
        assert tokenizer.convert_tokens_to_ids(token) == number
    assert tables[0].requires_grad == recorded["in_requires_grad"]
    assert tables[1].requires_grad == recorded["out_requires_grad"]
    for table, key in zip(tables, ("in_rows_sum", "out_rows_sum"), strict=True):
        if recorded[key] is not None:
            assert table[before:].sum(dim=1).tolist() == pytest.approx(recorded[key], abs=1e-5)
