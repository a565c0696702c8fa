"""Conversation data: samples are read, tokenised and their images prepared when they are needed."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, default_conversation
from llava.mm_utils import load_image, process_images

from .labels import preprocess
from .samples import Findings, check_conversations, missing_files, read_rows

# A sample with an image counts as this many words longer when batches are formed by length.
IMAGE_WORDS = 128


def preprocess_multimodal(
    messages: Sequence[dict], conv: Conversation, mm_use_im_start_end: bool = False
) -> list[dict]:
    """The messages with each image mark moved to the front of its message, in the template's form.

    Several marks in one message collapse into one.
    """
    image = DEFAULT_IMAGE_TOKEN
    if "mmtag" in conv.version:
        image = f"<Image>{image}</Image>"
    if mm_use_im_start_end:
        marked = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        image = image.replace(DEFAULT_IMAGE_TOKEN, marked)
    out = []
    for message in messages:
        value = message["value"]
        if DEFAULT_IMAGE_TOKEN in value:
            text = value.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            value = f"{image}\n{text}".strip()
        out.append({**message, "value": value})
    return out


class LazySupervisedDataset(Dataset):
    """Samples of a JSON list or of JSON lines, made one by one.

    data_path: file with `[{"id", "image"?, "conversations": [{"from", "value"}, ...]}, ...]`; image
               paths are relative to `data_args.image_folder`
    data_args: `DataArguments`; a multimodal run adds `image_processor`, `mm_use_im_start_end`,
               `tokens_per_image` and, for anyres, `image_grid_pinpoints`
    conv:      prompt template
    skip:      places in the file of samples to leave out

    Raises ValueError for samples that cannot be used, all of which are found here; with
    `data_args.skip_bad_samples` they are left out.

    An item holds `input_ids` and `labels` (S,); in a multimodal run also `image` (3, H, W), zeros
    for a text-only sample, or (1 + T, 3, H, W) with anyres, then with `image_size` (width, height).
    """

    def __init__(
        self,
        data_path: str,
        tokenizer,
        data_args,
        conv: Conversation | None = None,
        skip: Sequence[int] = (),
    ):
        self.data_path, self.tokenizer, self.data_args = data_path, tokenizer, data_args
        self.conv = default_conversation if conv is None else conv
        samples = read_rows(data_path)
        if outside := sorted(place for place in skip if not 0 <= place < len(samples)):
            raise ValueError(f"skip_samples {outside[0]}: the data has {len(samples)} samples")
        skip = set(skip)
        self.numbers = [number for number in range(len(samples)) if number not in skip]
        self.samples = [samples[number] for number in self.numbers]
        self._check()

    def _check(self) -> None:
        findings = Findings(self.data_path)
        check_conversations(self.samples, self.numbers, self.conv, findings)
        bad = {number for number, _ in findings.mistakes}
        good, lost = [i for i, number in enumerate(self.numbers) if number not in bad], 0
        paths = {i: self._path(self.samples[i]) for i in good if "image" in self.samples[i]}
        if paths and not self.data_args.is_multimodal:
            raise ValueError(
                f"{self.data_path}: {len(paths)} of {len(self.samples)} samples have an image, but "
                "the model has no vision tower: name one with --vision_tower"
            )
        missing = missing_files(paths.values())
        for i in good:
            number, sample = self.numbers[i], self.samples[i]
            if paths.get(i) in missing:
                findings.mistake(number, sample, f"there is no file {paths[i]}")
                bad.add(number)
            elif not self._keeps_an_answer(sample):
                lost, limit = lost + 1, self.tokenizer.model_max_length
                what = f"samples lose all answers to model_max_length {limit} and teach nothing"
                findings.note(number, sample, what)
        findings.report(len(self.samples), getattr(self.data_args, "skip_bad_samples", False))
        if good and lost == len(good):
            tokens = getattr(self.data_args, "tokens_per_image", 0)
            raise ValueError(
                f"{self.data_path}: model_max_length {self.tokenizer.model_max_length} cuts away "
                f"the answers of all {lost} samples (an image takes {tokens} tokens): raise it"
            )
        if bad:
            good = [i for i in good if self.numbers[i] not in bad]
            self.samples = [self.samples[i] for i in good]
            self.numbers = [self.numbers[i] for i in good]

    @functools.cached_property
    def _template_length(self) -> int:
        """At least the number of ids that the template puts around a question."""
        question = {"from": "human", "value": DEFAULT_IMAGE_TOKEN}
        sample = {"image": "", "conversations": [question, {"from": "gpt", "value": "x"}]}
        return len(self._tokens(sample)["input_ids"]) + 16

    def _keeps_an_answer(self, sample: dict) -> bool:
        """Whether something to learn is left of a sample that is cut to `model_max_length`.

        Texts are tokenised only when they could be too long: no token is shorter than a byte.
        """
        limit, messages = self.tokenizer.model_max_length, sample["conversations"]
        visual = getattr(self.data_args, "tokens_per_image", 1) if "image" in sample else 0
        first = next(i for i, message in enumerate(messages) if i and message["from"] == "gpt")
        before = [message["value"] for message in messages[:first]]
        if visual >= limit and any(DEFAULT_IMAGE_TOKEN in text for text in before):
            return False
        room = limit - visual - self._template_length
        if 4 * sum(map(len, before)) < room or sum(len(text.encode()) for text in before) < room:
            return True
        if getattr(self.data_args, "label_masks", "exact") != "exact":
            return True  # these masks lose whole samples for reasons of their own
        labels, ids = (self._tokens(sample)[key] for key in ("labels", "input_ids"))
        learned = (labels != IGNORE_INDEX).nonzero()[:, 0]
        if not len(learned):
            return not any(m["value"].strip() for m in messages if m["from"] == "gpt")
        place = int(learned[0])
        images = int((ids[:place] == IMAGE_TOKEN_INDEX).sum())
        return place + images * (visual - 1) < limit

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> list[int]:
        """White-space separated words of each sample, IMAGE_WORDS more with an image."""
        return [_words(s) + (IMAGE_WORDS if "image" in s else 0) for s in self.samples]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each sample, negative without an image."""
        return [_words(s) if "image" in s else -_words(s) for s in self.samples]

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        sample = self.samples[i]
        has_image = "image" in sample
        try:
            image = self._image(sample) if has_image else {}
            item = self._tokens(sample)
        except (OSError, ValueError, KeyError) as error:
            where = f"{self.data_path}, sample {self.numbers[i]} (id {sample.get('id')!r})"
            raise ValueError(f"{where}: {error}") from error
        if not has_image and self.data_args.is_multimodal:
            image = self._no_image()
        return item | image

    def _tokens(self, sample: dict) -> dict[str, torch.Tensor]:
        args, messages, has_image = self.data_args, sample["conversations"], "image" in sample
        if has_image:
            marked = getattr(args, "mm_use_im_start_end", False)
            messages = preprocess_multimodal(messages, self.conv, marked)
        label_masks = getattr(args, "label_masks", "exact")
        return preprocess(messages, self.tokenizer, self.conv, has_image, label_masks)

    def _path(self, sample: dict) -> str:
        return os.path.join(self.data_args.image_folder or "", sample["image"])

    def _image(self, sample: dict) -> dict:
        args = self.data_args
        image = load_image(os.path.join(args.image_folder or "", sample["image"]))
        pixels = process_images([image], args.image_processor, args)[0]
        anyres = args.image_aspect_ratio == "anyres"
        return {"image": pixels} | ({"image_size": image.size} if anyres else {})

    def _no_image(self) -> dict:
        crop = self.data_args.image_processor.crop_size
        size = (crop["width"], crop["height"])
        anyres = self.data_args.image_aspect_ratio == "anyres"
        zeros = torch.zeros(3, size[1], size[0])
        return {"image": zeros} | ({"image_size": size} if anyres else {})


def _words(sample: dict) -> int:
    return sum(len(message["value"].split()) for message in sample["conversations"])


@dataclass
class DataCollatorForSupervisedDataset:
    """Pads a batch on the right and cuts it to `tokenizer.model_max_length`.

    Gives `input_ids`, `labels` and `attention_mask` (B, S), the mask from the lengths (an unknown
    token in the text is not padding); `images` (B, 3, H, W), or a list where shapes differ, and
    `image_sizes` where the samples have them.
    """

    tokenizer: object

    def __call__(self, instances: Sequence[dict]) -> dict:
        limit = self.tokenizer.model_max_length
        ids = [instance["input_ids"][:limit] for instance in instances]
        labels = [instance["labels"][:limit] for instance in instances]
        lengths = torch.tensor([len(row) for row in ids])
        batch = {
            "input_ids": pad_sequence(ids, True, self.tokenizer.pad_token_id),
            "labels": pad_sequence(labels, True, IGNORE_INDEX),
        }
        places = torch.arange(batch["input_ids"].shape[1])
        batch["attention_mask"] = places < lengths[:, None]
        if "image" in instances[0]:
            images = [instance["image"] for instance in instances]
            same = len({image.shape for image in images}) == 1
            batch["images"] = torch.stack(images) if same else images
        if "image_size" in instances[0]:
            batch["image_sizes"] = [instance["image_size"] for instance in instances]
        return batch


def make_supervised_data_module(
    tokenizer, data_args, conv: Conversation | None = None, skip: Sequence[int] = ()
) -> dict:
    """The Trainer's `train_dataset`, `eval_dataset` (None) and `data_collator`."""
    path = data_args.data_path
    if path is None:
        raise ValueError("--data_path is missing: a JSON list of conversations, or JSON lines")
    return {
        "train_dataset": LazySupervisedDataset(path, tokenizer, data_args, conv, skip),
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }
