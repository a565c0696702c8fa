"""Writes a checkpoint in the layout of other programs, or one of theirs in ours.

    python -m llava.model.export --to llama --model-path CHECKPOINT --save-model-path OUT
    python -m llava.model.export --to llava-hf --model-path CHECKPOINT --save-model-path OUT
    python -m llava.model.export --from llava-hf --model-path FOLDER --save-model-path OUT

`--to llama` is the language model alone (a plain Llama, Mistral or Qwen2), `--to llava-hf` the
layout of transformers for LLaVA-1.5 and LLaVA-NeXT, `--to qwen2.5-vl` that of Qwen2.5-VL. Adapters
and projectors are merged into their base (`--model-base`). Every number is written as it was
stored, unless `--dtype` says otherwise. See docs/Checkpoints.md.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessor, PreTrainedTokenizerBase

from ..checkpoint_kind import OTHER_FAMILIES, Kind, kind_of
from ..config_file import read_config
from ..conv_mode import choose_conv_mode
from ..errors import errors_as_messages
from ..llava_hf import (
    DEFAULT_IMAGE_ID,
    GENERATIONS,
    LAYOUT,
    RELEASED,
    ROWS_MULTIPLE,
    SETTINGS,
    check_words,
    config_there,
    is_llava_hf,
    name_here,
    name_there,
)
from ..log_output import say
from ..mm_utils import get_model_name_from_path
from ..model_args import DTYPES
from ..program_parser import ProgramParser
from ..pruning.required import required
from ..weight_files import float_type_in, local_folder, weight_files
from . import export_files as files
from .builder import load_pretrained_model
from .checkpoint import (
    DECODER_WEIGHTS,
    TOWER_PREFIX,
    fit_rows,
    is_ignored,
    is_vocabulary,
    write_checkpoint,
    write_generation_config,
)
from .multimodal_encoder.builder import resolve_tower_path, tower_beside
from .qwen2_5_vl_loading import module_name

LLAMA, QWEN, OURS = "llama", "qwen2.5-vl", "llava"
#: family -> architecture of its language model alone, and `model_type`
DECODERS = {
    "llama": ("LlamaForCausalLM", "llama"),
    "mistral": ("MistralForCausalLM", "mistral"),
    "qwen2_5_vl": ("Qwen2ForCausalLM", "qwen2"),
}
#: beginnings of names of the language model's weights
DECODER_PARTS = ("model.embed_tokens.", *DECODER_WEIGHTS)
TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "tie_word_embeddings",
    "sliding_window",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_sliding_window",
    "max_window_layers",
)
VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "projection_dim",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
)
#: folder in a checkpoint of ours for the tower of a model that brought its own
TOWER_FOLDER = "vision_tower"
TRAINED_PART = "pruner.bin"


@dataclass
class Source:
    """A checkpoint in memory, on the CPU, in the types it is stored in.

    folder: where its settings and tokenizer are: that of the base, if there is one
    name:   what it is called
    """

    folder: str
    name: str
    kind: Kind
    model: Any
    tokenizer: PreTrainedTokenizerBase
    processor: CLIPImageProcessor | None

    @property
    def config(self):
        return self.model.config

    def tensors(self, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
        """Weights by their names here; a head that is the table of embeddings is there once."""
        tied = self.model._tied_weights_keys if self.config.tie_word_embeddings else ()
        return {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if wanted(name) and not is_ignored(name) and name not in (tied or ())
        }


def export(
    model_path: str,
    save_model_path: str,
    to: str,
    model_base: str | None = None,
    names: str = RELEASED,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the checkpoint at `model_path`, on top of `model_base` if it needs one, in another
    layout.

    save_model_path: a folder that does not exist yet; it is there when all of it is written
    to:              "llama", "llava-hf", "qwen2.5-vl", or "llava" for ours
    names:           generation of the weights' names, of llava-hf and Qwen2.5-VL
    dtype:           of all weights; None: as they are stored
    Raises ValueError for a model that the layout has no words for, FileExistsError where the
    folder exists, and what loading raises.
    """
    partial = f"{os.path.normpath(save_model_path)}.partial"
    if os.path.exists(save_model_path) and not is_empty(save_model_path):
        raise FileExistsError(f"{save_model_path} exists already: name a new folder to write")
    if os.path.exists(partial):
        raise FileExistsError(f"{partial}, left by a run that was ended, is in the way: remove it")
    folder, base = local_folder(model_path), model_base and local_folder(model_base)
    name = get_model_name_from_path(model_path)
    kind, values = kind_of(folder, base or None, name)
    check_target(model_path, to, kind, values, is_llava_hf(read_config(base or folder)))
    own, tower = (dtype, dtype) if dtype else stored_types(folder, base, values)
    tokenizer, model, processor, _ = load_pretrained_model(
        folder,
        base or None,
        name,
        device="cpu",
        torch_dtype=own,
        vision_tower_dtype=tower,
    )
    source = Source(base or folder, name, kind, model, tokenizer, processor)
    if os.path.isfile(os.path.join(folder, TRAINED_PART)):
        say(
            f"{TRAINED_PART} in {folder} is the trained part of a pruning method. It is left out: "
            "other programs have no place for it. Here it goes on working beside the original."
        )
    os.makedirs(partial)
    try:
        with torch.no_grad():
            WRITERS[to](source, partial, names)
        if os.path.isdir(save_model_path):
            os.rmdir(save_model_path)
        os.rename(partial, save_model_path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    say(f"{save_model_path} holds {read_config(save_model_path)['architectures'][0]}.")


def is_empty(path: str) -> bool:
    return os.path.isdir(path) and not os.listdir(path)


def check_target(path: str, to: str, kind: Kind, values: dict, theirs: bool) -> None:
    """Raises ValueError when a model of this kind, with these config values, cannot be written in
    the layout `to`; theirs: whether it is in that of transformers."""
    if not kind.multimodal:
        raise ValueError(f"{path} is a plain language model: there is nothing to take out of it")
    qwen = kind.family in OTHER_FAMILIES
    if to == OURS and not theirs:
        raise ValueError(f"{path} is not in the layout {LAYOUT}")
    if to in (LAYOUT, QWEN) and qwen != (to == QWEN):
        fitting = f"--to {QWEN if qwen else LAYOUT} or --to {LLAMA}"
        raise ValueError(f"{path} is no model for --to {to}: choose {fitting}")
    if to == LAYOUT:
        check_words(values, path)


def stored_types(
    folder: str, base: str | None, values: dict
) -> tuple[torch.dtype, torch.dtype | None]:
    """The types that a model and its tower are stored in, the latter None where there is no CLIP;
    values: of the config in our words."""
    paths = weight_files(base or folder)

    def in_tower(name: str) -> bool:
        return name_here(name).startswith(TOWER_PREFIX)

    own = float_type_in(paths, lambda name: not in_tower(name))
    if own is None:
        raise ValueError(f"{base or folder} holds no floating-point weights of a language model")
    brought = values.get("unfreeze_mm_vision_tower")
    tower = float_type_in(paths, in_tower) if brought else None
    if tower is None and (name := values.get("mm_vision_tower")):
        beside = tower_beside(name, folder) or base and tower_beside(name, base)
        path = local_folder(beside or resolve_tower_path(name, folder))
        tower = float_type_in(weight_files(path))
    return own, tower


def write_llama(source: Source, folder: str, names: str) -> None:
    """The language model alone, for programs that get embeddings in place of images."""
    tensors = source.tensors(lambda name: name.startswith(DECODER_PARTS))
    write_checkpoint(folder, tensors)
    files.write_json(folder, "config.json", text_config(source))
    write_generation_config(folder, source.model.generation_config)
    files.save_tokenizer(source.tokenizer, folder)
    if source.kind.family in OTHER_FAMILIES:
        say(
            "Qwen2.5-VL gives the tokens of an image positions on three axes, which a plain Qwen2 "
            "has not: texts get the same logits, images do not."
        )


def text_config(source: Source) -> dict:
    """config.json of the language model alone."""
    architecture, model_type = DECODERS[source.kind.family]
    values = {key: getattr(source.config, key) for key in TEXT_KEYS if hasattr(source.config, key)}
    if source.kind.family in OTHER_FAMILIES:
        values |= {"rope_scaling": None, "use_sliding_window": False}
    table = source.model.get_input_embeddings().weight
    values |= {"vocab_size": len(table), "torch_dtype": str(table.dtype).removeprefix("torch.")}
    return {"architectures": [architecture], "model_type": model_type, **values}


def write_llava_hf(source: Source, folder: str, names: str) -> None:
    """The layout of transformers. The vocabulary gets tokens for images and padding, and rows (the
    mean of all others) up to a multiple of 64."""
    tokenizer, config = source.tokenizer, source.config
    conv_mode = choose_conv_mode(config, source.name).name
    before = {"pad_token": tokenizer.pad_token, "padding_side": tokenizer.padding_side}
    before |= {"pad_token_id": config.pad_token_id, "vocab_size": config.vocab_size}
    image_token, pad_token = files.add_layout_tokens(tokenizer)
    rows = max(config.vocab_size, len(tokenizer))
    rows = -(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE
    vision = vision_config(source)
    values = config_there(config, vision, text_config(source), rows, image_token, pad_token)
    values[SETTINGS] |= {"conv_mode": conv_mode, **before}
    tensors = {
        name_there(name, names): with_rows(tensor, rows) if is_vocabulary(name) else tensor
        for name, tensor in source.tensors().items()
    }
    write_checkpoint(folder, tensors)
    files.write_json(folder, "config.json", values)
    generation = source.model.generation_config
    generation.pad_token_id = pad_token
    write_generation_config(folder, generation)
    files.save_tokenizer(tokenizer, folder)
    files.save_processor(source.processor, folder, values, conv_mode)


def with_rows(table: Tensor, rows: int) -> Tensor:
    return table if len(table) == rows else fit_rows(table, rows)


def vision_config(source: Source) -> dict:
    tower = source.model.get_vision_tower().config
    return {key: getattr(tower, key) for key in VISION_KEYS}


def write_ours(source: Source, folder: str, names: str) -> None:
    """Our layout, the tower in a folder of its own, without what `write_llava_hf` adds."""
    config, inner = source.config, f"{TOWER_PREFIX}vision_tower."
    raw = read_config(source.folder)
    before: dict = settings if isinstance(settings := raw.get(SETTINGS), dict) else {}
    rows = rows_before(raw, before, config.vocab_size)
    more = files.tokens_behind(source.tokenizer, rows)
    if more is None:  # nothing but what the layout adds
        config.vocab_size, config.padded_vocabulary = rows, False
        entries = {"pad_token": source.tokenizer.unk_token}
        entries |= {key: before[key] for key in ("pad_token", "padding_side") if key in before}
        files.copy_tokenizer(source.folder, folder, rows, **entries)
        config.pad_token_id = before.get("pad_token_id", source.tokenizer.unk_token_id)
        source.model.generation_config.pad_token_id = config.pad_token_id
    else:
        rows = config.vocab_size
        say(f"The vocabulary stays as it is, with its tokens {', '.join(map(repr, more))}.")
        source.tokenizer.save_pretrained(folder)
    tensors = {
        name: tensor[:rows] if is_vocabulary(name) else tensor
        for name, tensor in source.tensors(lambda name: not name.startswith(TOWER_PREFIX)).items()
    }
    write_checkpoint(folder, tensors)
    config.mm_vision_tower, config.unfreeze_mm_vision_tower = TOWER_FOLDER, False
    config.torch_dtype = source.model.get_input_embeddings().weight.dtype
    config._name_or_path = ""
    config.save_pretrained(folder)
    write_generation_config(folder, source.model.generation_config)
    tower = os.path.join(folder, TOWER_FOLDER)
    tensors = source.tensors(lambda name: name.startswith(inner))
    write_checkpoint(tower, {name.removeprefix(inner): t for name, t in tensors.items()})
    kind = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    files.write_json(tower, "config.json", kind | vision_config(source))
    files.clip_processor(source.processor).save_pretrained(tower)


def rows_before(raw: dict, before: dict, rows: int) -> int:
    """How many of the `rows` there were before the layout's tokens: what our exports say, or those
    in front of the image's token."""
    said = (before.get("vocab_size"), raw.get("image_token_index"), raw.get("image_token_id"))
    return next((n for n in (*said, DEFAULT_IMAGE_ID) if type(n) is int and 0 < n <= rows), rows)


def write_qwen(source: Source, folder: str, names: str) -> None:
    """Qwen2.5-VL, with the names of weights of either generation."""
    rename = str if names == RELEASED else module_name
    write_checkpoint(folder, {rename(name): t for name, t in source.tensors().items()})
    config = source.config
    config._name_or_path = ""
    config.save_pretrained(folder)
    write_generation_config(folder, source.model.generation_config)
    required(source.processor, f"{source.name} has no image processor").save_pretrained(folder)
    files.copy_files(source.folder, folder)


WRITERS = {LLAMA: write_llama, LAYOUT: write_llava_hf, QWEN: write_qwen, OURS: write_ours}


@errors_as_messages()
def main() -> None:
    parser = ProgramParser(__doc__, whole=True)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=(LLAMA, LAYOUT, QWEN), help="layout to write")
    way.add_argument("--from", dest="source", choices=(LAYOUT,), help="layout to write in ours")
    parser.add_argument("--model-path", required=True, help="folder or hub repository to read")
    parser.add_argument("--model-base", help="base model of a projector or LoRA checkpoint")
    parser.add_argument("--save-model-path", required=True, help="new folder to write")
    parser.add_argument(
        "--names",
        choices=GENERATIONS,
        default=RELEASED,
        help="names of the weights: as in released files, or as modules are called since "
        "transformers 4.52",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of all weights (default: as stored)")
    args = parser.parse_args()
    export(
        args.model_path,
        args.save_model_path,
        args.to or OURS,
        args.model_base,
        args.names,
        DTYPES.get(args.dtype),
    )


if __name__ == "__main__":
    main()
