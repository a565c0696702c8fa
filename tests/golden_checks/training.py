"""Recorded training: label masks, batches, losses and gradients, orders, optimizer groups."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoTokenizer, LlamaTokenizer

from llava.conversation import conv_templates
from llava.model.builder import load_pretrained_model
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.labels import preprocess
from llava.train.model_setup import find_all_linear_names
from llava.train.optimizer import parameter_groups
from llava.train.sample_images import preprocess_multimodal
from llava.train.sampler import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)
from tests.golden_cases import load_arrays, load_json, locate

LOSS_ATOL = 2e-5
GRADIENTS_RTOL = 1e-3
MARKERS = ["<|im_start|>", "<|im_end|>"]
#: sampled pixels of a batch: every 48th, beginning with the 12th
SAMPLED = slice(12, None, 48)


def check_training(case, folder, report):
    """One of the three recorded files."""
    if case["file"] == "train_labels.json":
        check_labels(case, folder, report)
    elif case["file"] == "train_data.json":
        check_data(case, folder, report)
    else:
        check_batch(case, folder, report)


# Labels.


def check_labels(case, folder, report):
    """Ids and labels of every template, sample and tokenizer, as released."""
    content = load_json(case, folder)
    for row in content["cases"]:
        report.prefix = f"{row['template']}, {row['sample']}, {row['tokenizer']}: "
        tokenizer = label_tokenizer(locate(case["checkpoint"], folder), row)
        check_sample(row, content["samples"][row["sample"]], tokenizer, report)
    report.prefix = ""


def label_tokenizer(path, row):
    legacy = "legacy_false" not in row["tokenizer"]
    limit = row["model_max_length"]
    tokenizer = LlamaTokenizer.from_pretrained(path, legacy=legacy, model_max_length=limit)
    if "im_tokens" in row["tokenizer"]:
        tokenizer.add_tokens(MARKERS, special_tokens=True)
    return tokenizer


def check_sample(row, messages, tokenizer, report):
    conv = conv_templates[row["template"]]
    if row["has_image"]:
        messages = preprocess_multimodal(messages, conv, row["mm_use_im_start_end"])
        values = [message["value"] for message in messages]
        report.equal("messages", values, row["after_preprocess_multimodal"])
    try:
        item = preprocess(messages, tokenizer, conv, row["has_image"], label_masks="released")
    except ValueError as error:
        report.true(f"raises {error}", "error" in row)
        return
    if "error" in row:
        report.add(f"is accepted, recorded {row['error']}")
        return
    report.equal("input_ids", item["input_ids"].tolist(), row["input_ids"])
    report.equal("labels", item["labels"].tolist(), row["labels"])


# Data, losses, orders.


class Training:
    """The recorded data set and model, made once per check."""

    def __init__(self, case, content, folder):
        checkpoint = locate(case["checkpoint"], folder)
        self.content, self.checkpoint = content, checkpoint
        _, self.model, self.processor, _ = load_pretrained_model(
            str(checkpoint), None, checkpoint.name, device="cpu", torch_dtype=torch.float32
        )
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, use_fast=False)
        self.tokenizer.model_max_length = 2048
        images = [sample["image"] for sample in content["data"] if "image" in sample]
        self.image_folder = str(locate(images[0], folder).parent)

    def dataset(self, mode="pad"):
        data_args = SimpleNamespace(
            image_folder=self.image_folder,
            image_processor=self.processor,
            image_aspect_ratio=mode,
            is_multimodal=True,
        )
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "data.json"
            path.write_text(json.dumps(self.content["data"]))
            return LazySupervisedDataset(str(path), self.tokenizer, data_args)

    def batch(self):
        dataset = self.dataset()
        return DataCollatorForSupervisedDataset(self.tokenizer)(
            [dataset[i] for i in range(len(dataset))]
        )

    def rows(self, name: str) -> list[int]:
        """Samples of a recorded loss."""
        samples = self.content["data"]
        with_image = [i for i, sample in enumerate(samples) if "image" in sample]
        text_only = [i for i in range(len(samples)) if i not in with_image]
        return {
            "image_plus_text": [with_image[0], text_only[0]],
            "two_images": with_image[-2:],
        }.get(name, list(range(len(samples))))

    def loss(self, rows: list[int], only_projector: bool) -> torch.Tensor:
        """The loss of a batch in training mode, with its gradients on the model."""
        self.model.train()
        self.model.requires_grad_(not only_projector)
        self.model.get_vision_tower().requires_grad_(False)
        self.model.get_model().mm_projector.requires_grad_(True)
        self.model.zero_grad()
        loss = self.model(**{key: value[rows] for key, value in self.batch().items()}).loss
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, torch.Tensor]:
        parameters = self.model.named_parameters()
        return {name: p.grad for name, p in parameters if p.grad is not None}


def check_data(case, folder, report):
    """Lengths, losses, gradient norms, orders, optimizer groups, LoRA targets, new tokens."""
    content = load_json(case, folder)
    training = Training(case, content, folder)
    dataset = training.dataset()
    report.equal("len", len(dataset), content["len"])
    report.equal("lengths", dataset.lengths, content["lengths"])
    report.equal("modality_lengths", dataset.modality_lengths, content["modality_lengths"])
    report.equal("item keys", sorted(dataset[0]), content["item_keys"])
    for row in content["loss"]:
        report.prefix = f"{row['name']}, {row['mode']}: "
        loss = training.loss(training.rows(row["name"]), row["mode"] == "projector")
        norms = {name: g.double().norm().item() for name, g in training.gradients().items()}
        report.close("loss", loss, row["loss"], LOSS_ATOL)
        report.equal("parameters with gradient", len(norms), row["n_params_with_grad"])
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        report.close("gradient norm", total, row["grad_norm_total"], 1e-4, GRADIENTS_RTOL)
        for name, norm in row["grad_norms"].items():
            report.close(f"gradient norm of {name}", norms[name], norm, 1e-4, GRADIENTS_RTOL)
    report.prefix = ""
    check_orders(content["sampler"], report)
    training.model.requires_grad_(True)
    training.model.get_vision_tower().requires_grad_(False)
    check_groups(training.model, content["optimizer_groups"], report)
    linear = find_all_linear_names(training.model)
    report.equal("LoRA targets", linear, content["find_all_linear_names"])
    for row in content["initialize_vision_tokenizer"]:
        check_new_tokens(training.checkpoint, row, report)


def check_orders(content, report):
    for row in content["split_to_even_chunks"]:
        chunks = split_to_even_chunks(row["indices"], row["lengths"], row["num_chunks"])
        report.equal("even chunks", chunks, row["out"])
    lengths, signed = content["lengths"], content["modality_lengths"]
    for row in content["cases"]:
        size, seed = (row["batch_size"], row["world_size"]), row["seed"]

        def generator(seed=seed):
            torch.manual_seed(seed)
            return torch.Generator().manual_seed(seed)

        orders = {"length_grouped": get_length_grouped_indices(lengths, *size, generator())}
        orders["modality_grouped_gen_and_global_seed"] = get_modality_length_grouped_indices(
            signed, *size, generator()
        )
        generator()
        sampler = LengthGroupedSampler(*size, lengths=signed, group_by_modality=True)
        orders["sampler_modality_global_seed"] = list(sampler)
        generator()
        orders["sampler_plain_global_seed"] = list(LengthGroupedSampler(*size, lengths))
        for name, order in orders.items():
            report.equal(f"{name}, seed {seed}", order, row[name])


def check_groups(model, content, report):
    names = {id(p): name for name, p in model.named_parameters()}
    for title, recorded in content.items():
        report.prefix = f"{title}: "
        lr = title.split()[-1]
        groups = parameter_groups(model, 0.1, None if lr == "None" else float(lr))
        report.equal("number of groups", len(groups), len(recorded))
        for group, row in zip(groups, recorded, strict=False):
            members = [names[id(p)] for p in group["params"]]
            projector = [name for name in members if "mm_projector" in name]
            report.equal("parameters", len(members), row["n"])
            report.equal("weight decay", group["weight_decay"], row["weight_decay"])
            report.equal("learning rate", group.get("lr"), row["lr"])
            report.true("members differ", set(row["first"]) <= set(members))
            report.equal("lm_head", "lm_head.weight" in members, row["has_lm_head"])
            report.equal("projector", projector, row["projector"])
            report.equal("norms", sum("norm" in name for name in members), row["n_norm"])
            report.equal("biases", sum("bias" in name for name in members), row["n_bias"])
    report.prefix = ""


def check_new_tokens(checkpoint, row, report):
    tokenizer, model, _, _ = load_pretrained_model(
        str(checkpoint), None, checkpoint.name, device="cpu", torch_dtype=torch.float32
    )
    before = model.config.vocab_size
    flags = {key: value for key, value in row.items() if key.startswith(("mm_use", "tune"))}
    report.prefix = f"new tokens, {flags}: "
    model.initialize_vision_tokenizer(
        SimpleNamespace(pretrain_mm_mlp_adapter=None, **flags), tokenizer
    )
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    report.equal("vocabulary", [before, len(tables[0])], row["vocab"])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in row["ids"]}
    report.equal("ids", ids, row["ids"])
    for table, side in zip(tables, ("in", "out"), strict=True):
        report.equal(f"{side}_requires_grad", table.requires_grad, row[f"{side}_requires_grad"])
        if row[f"{side}_rows_sum"] is not None:
            report.close("new rows", table[before:].sum(1), row[f"{side}_rows_sum"], 1e-5)
    report.prefix = ""


# Batches.


def check_batch(case, folder, report):
    """The collated batch, its splice, and gradients of the projector's first bias."""
    recorded = load_arrays(case, folder)
    content = load_json({"file": "train_data.json"}, folder)
    training = Training(case, content, folder)
    batch = training.batch()
    for key in ("input_ids", "labels", "attention_mask"):
        report.equal(f"batch {key}", batch[key], recorded[f"batch_{key}"])
    report.equal("images", list(batch["images"].shape), recorded["batch_images_shape"].tolist())
    for mode in ("pad", "square"):
        items = [item["image"] for item in training.dataset(mode)]
        sampled = torch.stack(items)[..., SAMPLED, SAMPLED]
        report.close(f"pixels, {mode}", sampled, recorded[f"batch_images_sampled_{mode}"], 1e-4)
    text_only = [i for i, sample in enumerate(content["data"]) if "image" not in sample]
    report.true("the image of a text-only sample is not zero", not batch["images"][text_only].any())
    for key in recorded:
        if key.endswith("_spliced_labels"):
            check_splice(training, batch, key.removesuffix("_spliced_labels"), recorded, report)
    for row in content["loss"]:
        key = f"{row['name']}_{row['mode']}_proj0_bias_grad"
        if key in recorded:
            training.loss(training.rows(row["name"]), row["mode"] == "projector")
            bias = training.gradients()["model.mm_projector.0.bias"]
            report.close(key, bias, recorded[key], 1e-4, GRADIENTS_RTOL)


def check_splice(training, batch, name, recorded, report):
    rows = training.rows(name)
    with torch.no_grad():
        _, _, mask, _, _, labels = training.model.prepare_inputs_labels_for_multimodal(
            batch["input_ids"][rows],
            None,
            batch["attention_mask"][rows],
            None,
            batch["labels"][rows],
            batch["images"][rows],
        )
    report.equal(f"{name}: spliced labels", labels, recorded[f"{name}_spliced_labels"])
    report.equal(f"{name}: spliced mask", mask, recorded[f"{name}_spliced_mask"])
