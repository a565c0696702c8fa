"""Turns the REFER annotations of RefCOCO, RefCOCO+ or RefCOCOg into question and box files.

python scripts/convert_refcoco_to_llava.py --refer-dir DIR --dataset refcoco --split testA \
    --dst playground/data/eval/refcoco

DIR/refcoco holds `refs(unc).p` and `instances.json` (https://github.com/lichengunc/refer);
RefCOCOg has `refs(umd).p`. Every description is a question of its own, as in the published
numbers. Images are those of COCO train2014. `--wording qwen2_5_vl` asks as Qwen2.5-VL was trained
to be asked: give it a data folder of its own.
"""

import os
import pickle

from llava.errors import errors_as_messages
from llava.eval.files.records import read_json
from llava.eval.files.writing import write_jsonl
from llava.program_parser import ProgramParser

WORDINGS = {
    "llava": "Please provide the bounding box coordinate of the region this sentence describes: "
    "{sentence}.",
    "qwen2_5_vl": "Locate {sentence} in this image and output the bbox coordinates in JSON format.",
}
#: what begins a sentence and is left out by the wording of Qwen2.5-VL
ARTICLES = ("a ", "an ", "the ")
SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, numbers and texts only: a pickle can carry any code."""

    def find_class(self, module, name):
        raise ValueError(f"the file wants to load {module}.{name}: it is not a REFER annotation")


def read_refs(path: str) -> list[dict]:
    with open(path, "rb") as file:
        try:
            return PlainUnpickler(file, encoding="latin1").load()
        except (pickle.UnpicklingError, EOFError) as error:  # the second of a file that is cut off
            raise ValueError(f"{path} is not a REFER annotation: {error}") from error


def asked(sentence: str, wording: str) -> str:
    """The question about the object that a sentence describes."""
    sentence = sentence.strip().rstrip(".")
    if wording == "qwen2_5_vl":
        article = next((own for own in ARTICLES if sentence.lower().startswith(own)), "")
        sentence = sentence[len(article) :]
    return WORDINGS[wording].format(sentence=sentence)


def convert(
    refs: list[dict], instances: dict, split: str, wording: str = "llava"
) -> tuple[list[dict], list[dict]]:
    """Returns the question lines and the lines with the right boxes of a split."""
    boxes = {entry["id"]: entry["bbox"] for entry in instances["annotations"]}
    images = {entry["id"]: entry for entry in instances["images"]}
    chosen = [ref for ref in refs if ref["split"] == split]
    if not chosen:
        raise ValueError(f"no split {split!r}, only {sorted({ref['split'] for ref in refs})}")
    questions, truth = [], []
    for ref in chosen:
        image, (x, y, width, height) = images[ref["image_id"]], boxes[ref["ann_id"]]
        for sentence in ref["sentences"]:
            key = sentence["sent_id"]
            text = asked(sentence["sent"], wording)
            line = {"question_id": key, "image": image["file_name"], "text": text}
            questions.append(line | {"category": "default"})
            size = {"width": image["width"], "height": image["height"]}
            truth.append({"question_id": key, "bbox": [x, y, x + width, y + height]} | size)
    return questions, truth


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--refer-dir", required=True, help="holds the folders of the data sets")
    parser.add_argument("--dataset", required=True, choices=sorted(SPLIT_BY), help="which one")
    parser.add_argument("--split-by", help="who split it (default: unc, for RefCOCOg umd)")
    parser.add_argument("--split", required=True, help="val, testA, testB or test")
    parser.add_argument("--dst", required=True, help="folder of the files to write")
    parser.add_argument(
        "--wording", choices=sorted(WORDINGS), default="llava", help="whose words to ask with"
    )
    args = parser.parse_args()
    folder = os.path.join(args.refer_dir, args.dataset)
    split_by = args.split_by or SPLIT_BY[args.dataset]
    refs = read_refs(os.path.join(folder, f"refs({split_by}).p"))
    instances = read_json(os.path.join(folder, "instances.json"))
    questions, truth = convert(refs, instances, args.split, args.wording)
    name = f"{args.dataset}_{args.split}.jsonl"
    write_jsonl(questions, os.path.join(args.dst, f"llava_{name}"))
    write_jsonl(truth, os.path.join(args.dst, name))
    print(f"{len(questions)} questions: {os.path.join(args.dst, f'llava_{name}')}")


if __name__ == "__main__":
    main()
