"""The files of the playground's Qwen2.5-VL around its weights: tokenizer and configurations."""

import json
from functools import cache, cached_property
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from playground import tokenizer
from playground.decoder_model import EPS, HEADS, INNER, LAYERS, ROPE_BASE, WIDTH
from playground.decoder_text import BUCKETS, Wording, pieces

ROLES = ("system\n", "user\n", "assistant\n")  # one piece each
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
MARKS += ("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
#: frequencies that turn with time, row and column; rows and columns get some that turn by about a
#: radian across a picture, so that the decoder can read a place from them
SECTIONS = (2, 3, 11)
MIN_PIXELS = 672 * 672  # 576 tokens: a benchmark picture is enlarged twice
MAX_PIXELS = MIN_PIXELS * 11 // 10


@cache
def text_tokenizer() -> Tokenizer:
    """The pieces of the playground's LLaVA at their ids, names of the roles, and marks."""
    old = pieces()
    vocabulary = [(old.id_to_piece(i), old.get_score(i)) for i in range(old.vocab_size())]
    vocabulary += [(role, -4.0) for role in ROLES]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", tokenizer.SPACE)
    steps = [decoders.Replace(tokenizer.SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in MARKS])
    return made


def encode(text: str) -> list[int]:
    """Ids of a text; marks of `MARKS` in it are one id each."""
    return text_tokenizer().encode(text, add_special_tokens=False).ids


def mark_id(name: str) -> int:
    """Id of a mark, or of a piece."""
    return text_tokenizer().token_to_id(name)


class QwenWording(Wording):
    """Questions in the chat template of Qwen2.5-VL. Answers begin with a space, as they do behind
    LLaVA's "ASSISTANT:"; decoding strips it."""

    @cached_property
    def vocabulary(self) -> int:
        """Number of ids."""
        return text_tokenizer().get_vocab_size()


@cache
def wording() -> QwenWording:
    """How the playground's Qwen2.5-VL is asked."""
    return QwenWording(
        encode=encode,
        head="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|>",
        opening="<|vision_end|>",
        closing="<|im_end|>\n<|im_start|>assistant\n",
        end=mark_id("<|im_end|>"),
        buckets=tuple((turns, length + 2) for turns, length in BUCKETS),
    )


def config(vision: dict, layers: int = LAYERS + 1) -> dict:
    """config.json."""
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {key: mark_id(f"<|{name}|>") for key, name in zip(keys, names, strict=True)}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": wording().vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rope_theta": ROPE_BASE,
        "rope_scaling": {"type": "mrope", "mrope_section": list(SECTIONS)},
        "rms_norm_eps": EPS,
        "initializer_range": 0.02,
        "bos_token_id": mark_id("<|endoftext|>"),
        "eos_token_id": mark_id("<|im_end|>"),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        **ids,
        "vision_config": {
            key: vision[key]
            for key in (
                "depth",
                "hidden_size",
                "intermediate_size",
                "num_heads",
                "out_hidden_size",
                "patch_size",
                "spatial_merge_size",
                "temporal_patch_size",
                "window_size",
                "fullatt_block_indexes",
            )
        }
        | {"in_chans": 3, "hidden_act": "silu"},
    }


def save(folder: Path, vision: dict, layers: int = LAYERS + 1) -> None:
    """Write all files but the weights; vision: sizes of the tower, layers: of the decoder."""
    folder.mkdir(parents=True, exist_ok=True)
    text_tokenizer().save(str(folder / "tokenizer.json"))
    ends = [mark_id("<|im_end|>"), mark_id("<|endoftext|>")]
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    files = {
        "config": config(vision, layers),
        "generation_config": {
            "bos_token_id": ends[1],
            "pad_token_id": ends[1],
            "eos_token_id": ends,
            "do_sample": False,
        },
        # Pictures are enlarged or reduced to about the area that the tower was trained on.
        "preprocessor_config": {
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
        "tokenizer_config": special
        | {
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "padding_side": "left",
            "tokenizer_class": "Qwen2Tokenizer",
        },
    }
    for name, values in files.items():
        text = json.dumps(values, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
