"""Conversation data: samples are read, tokenised and their images prepared when they are needed."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, default_conversation
from llava.progress import progress

from .labels import preprocess
from .sample_images import SampleImages
from .samples import Findings, check_conversations, missing_files, paths_of, read_rows


class LazySupervisedDataset(Dataset):
    """Samples of a JSON list or of JSON lines, made one by one.

    data_path: file with `[{"id", "image"?, "conversations": [{"from", "value"}, ...]}, ...]`; image
               paths, one or a list, are relative to `data_args.image_folder`
    data_args: `DataArguments`; a multimodal run adds `sample_images` (a `SampleImages`), or what
               that of LLaVA reads
    conv:      prompt template
    skip:      places in the file of samples to leave out

    Raises ValueError for samples that cannot be used, all of which are found here; with
    `data_args.skip_bad_samples` they are left out.

    An item holds `input_ids` and `labels` (S,); in a multimodal run also what `SampleImages.item`
    gives, for a text-only sample as well.
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
        self.images = getattr(data_args, "sample_images", None) or SampleImages(data_args)
        samples = read_rows(data_path)
        if outside := sorted(place for place in skip if not 0 <= place < len(samples)):
            raise ValueError(f"skip_samples {outside[0]}: the data has {len(samples)} samples")
        skip = set(skip)
        self.numbers = [number for number in range(len(samples)) if number not in skip]
        self.samples = [samples[number] for number in self.numbers]
        self._check()

    def _check(self) -> None:
        findings = Findings(self.data_path)
        forms = self.images.several, self.images.reserved
        check_conversations(self.samples, self.numbers, self.conv, findings, *forms)
        bad = {number for number, _ in findings.mistakes}
        good, lost = [i for i, number in enumerate(self.numbers) if number not in bad], 0
        paths = {i: self._paths(self.samples[i]) for i in good if "image" in self.samples[i]}
        if paths and not self.data_args.is_multimodal:
            raise ValueError(
                f"{self.data_path}: {len(paths)} of {len(self.samples)} samples have an image, but "
                "the model has no vision tower: name one with --vision_tower"
            )
        files = {path for own in paths.values() for path in own}
        wrong = {path: f"there is no file {path}" for path in missing_files(files)}
        wrong |= self.images.measure(files - wrong.keys())
        for i in progress(good, "samples", "samples"):
            number, sample = self.numbers[i], self.samples[i]
            if odd := [path for path in paths.get(i, ()) if path in wrong]:
                findings.mistake(number, sample, wrong[odd[0]])
                bad.add(number)
            elif not self.keeps_an_answer(sample):
                lost, limit = lost + 1, self.tokenizer.model_max_length
                what = f"samples lose all answers to model_max_length {limit} and teach nothing"
                findings.note(number, sample, what)
        findings.report(len(self.samples), getattr(self.data_args, "skip_bad_samples", False))
        if good and lost == len(good):
            visual = max(self.images.tokens(self._paths(self.samples[i])) for i in good)
            raise ValueError(
                f"{self.data_path}: model_max_length {self.tokenizer.model_max_length} cuts away "
                f"the answers of all {lost} samples (their images take up to {visual} tokens): "
                "raise it"
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

    def keeps_an_answer(self, sample: dict) -> bool:
        """Whether something to learn is left of a sample that is cut to `model_max_length`.

        Texts are tokenised only when they could be too long: no token is shorter than a byte.
        """
        limit, messages = self.tokenizer.model_max_length, sample["conversations"]
        first = next(i for i, message in enumerate(messages) if i and message["from"] == "gpt")
        before = [message["value"] for message in messages[:first]]
        shown = self._paths(sample)[: sum(text.count(DEFAULT_IMAGE_TOKEN) for text in before)]
        visual = self.images.tokens(shown)
        if visual >= limit:
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
        return place + visual - int((ids[:place] == IMAGE_TOKEN_INDEX).sum()) < limit

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> list[int]:
        """White-space separated words of each sample, and what its images count as."""
        return [_words(s) + self.images.words(self._paths(s)) for s in self.samples]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each sample, and what its images count as where they differ in length; negative
        without an image."""
        several = self.images.several
        return [
            _words(s) + (self.images.words(self._paths(s)) if several else 0)
            if "image" in s
            else -_words(s)
            for s in self.samples
        ]

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        sample = self.samples[i]
        try:
            images = self.images.item(self._paths(sample)) if self.data_args.is_multimodal else {}
            return self._tokens(sample) | images
        except (OSError, ValueError, KeyError) as error:
            where = f"{self.data_path}, sample {self.numbers[i]} (id {sample.get('id')!r})"
            raise ValueError(f"{where}: {error}") from error

    def _tokens(self, sample: dict) -> dict[str, torch.Tensor]:
        messages, has_image = sample["conversations"], "image" in sample
        if has_image:
            messages = self.images.marked(messages, self.conv)
        label_masks = getattr(self.data_args, "label_masks", "exact")
        return preprocess(messages, self.tokenizer, self.conv, has_image, label_masks)

    def _paths(self, sample: dict) -> list[str]:
        """The files of a sample's images."""
        folder = self.data_args.image_folder or ""
        return [os.path.join(folder, name) for name in paths_of(sample)]


def _words(sample: dict) -> int:
    return sum(len(message["value"].split()) for message in sample["conversations"])


@dataclass
class DataCollatorForSupervisedDataset:
    """Pads a batch on the right and cuts it to `tokenizer.model_max_length`.

    Gives `input_ids`, `labels` and `attention_mask` (B, S), the mask from the lengths (an unknown
    token in the text is not padding); `images` (B, 3, H, W), or a list where shapes differ, and
    `image_sizes` where the samples have them. Samples with `images` of their own give one list of
    all that are marked in the ids; where none is, of a blank one for each sample, so that processes
    that train together compute the same.
    """

    tokenizer: object
    blank: torch.Tensor | None = None

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
        if "images" in instances[0]:
            marks = [int((row == IMAGE_TOKEN_INDEX).sum()) for row in ids]
            pairs = zip(instances, marks, strict=True)
            images = [image for instance, n in pairs for image in instance["images"][:n]]
            batch["images"] = images or [self.blank] * len(instances)
        return batch


def check_data_path(path: str | None) -> None:
    """Raises ValueError or FileNotFoundError unless a file with samples is named."""
    if path is None:
        raise ValueError("--data_path is missing: a JSON list of conversations, or JSON lines")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--data_path {path}: there is no such file")


def make_supervised_data_module(
    tokenizer, data_args, conv: Conversation | None = None, skip: Sequence[int] = ()
) -> dict:
    """The Trainer's `train_dataset`, `eval_dataset` (None) and `data_collator`."""
    check_data_path(data_args.data_path)
    dataset = LazySupervisedDataset(data_args.data_path, tokenizer, data_args, conv, skip)
    return {
        "train_dataset": dataset,
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer, dataset.images.blank()),
    }
