"""The playground's sentencepiece tokenizer: words of the scenes are one piece each.

    python -m playground.tokenizer playground/checkpoints/llava-v1.5-playground

A unigram model written piece by piece instead of trained, so that it is the same everywhere:
frequent phrases, words, single characters (signs are read character by character) and bytes.
"""

import argparse
import json
from pathlib import Path

from transformers.convert_slow_tokenizer import import_protobuf

from playground import questions

# The same module as transformers uses: two definitions of one message cannot share a process.
schema = import_protobuf()

SPACE = "\u2581"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: ASSISTANT:"
)
PHRASES = (
    "Answer the question",
    " using a single",
    " word or phrase.",
    "Answer with the",
    " option's letter",
    " from the given",
    " choices directly.",
    "Please provide the",
    " bounding box coordinate",
    " of the region this",
    " sentence describes: the",
    " in the image?",
    " are there?",
    " is written on the",
    " [0.",
    ", 0.",
    " ASSISTANT:",
    "Reference OCR token: ",
)
WORDS = (
    "Is Are What Which How Where Describe There The the a an and or is are there thing things "
    "color many left right of above below higher lower further on in written sign signs says image "
    "yes no Yes No object objects picture word number this that not it A B C D to with"
)
ASCII = "".join(chr(code) for code in range(33, 127))


def pieces() -> list[str]:
    """All normal pieces, longest phrases first, single characters last."""
    words = {*WORDS.split(), *SYSTEM.split(), *questions.vocabulary()}
    words |= {word.rstrip(".,:?") for word in words}
    words = sorted(word for word in words if len(word) > 1 or word in "aABCD")
    found = [phrase.replace(" ", SPACE) for phrase in PHRASES]
    for word in words:
        found.append(SPACE + word)
        if word[0].isupper() and len(word) > 1:
            found.append(word)  # at the start of a line there is no space
    return list(dict.fromkeys([*found, SPACE, *ASCII]))


def build() -> bytes:
    """The serialised sentencepiece model; ids 0 unk, 1 bos, 2 eos, then bytes, then pieces."""
    model = schema.ModelProto()
    kinds = schema.ModelProto.SentencePiece
    for name, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=name, score=0, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0, type=kinds.BYTE)
    for piece in pieces():
        # every piece costs about the same, so the fewest pieces win; characters are a last resort
        score = -10.0 if len(piece) == 1 else -4.0 - 0.01 * len(piece)
        model.pieces.add(piece=piece, score=score, type=kinds.NORMAL)
    trainer = model.trainer_spec
    trainer.model_type = trainer.UNIGRAM
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()


def save(folder: Path) -> None:
    """Write tokenizer.model and the two JSON files that LlamaTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(build())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 2048,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    for name, value in (("special_tokens_map", special), ("tokenizer_config", special | settings)):
        text = json.dumps(value, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Write the tokenizer into a checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    save(parser.parse_args().folder)


if __name__ == "__main__":
    main()
