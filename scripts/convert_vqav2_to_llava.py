"""Turns the official questions of a VQAv2 split into a question file.

python scripts/convert_vqav2_to_llava.py --src v2_OpenEnded_mscoco_val2014_questions.json \\
    --dst vqav2/llava_vqav2_mscoco_val2014.jsonl

With it `SPLIT=val bash scripts/v1_5/eval/vqav2.sh` scores the validation split here; the answers to
the test split are known to its server only.
"""

from llava.errors import errors_as_messages
from llava.eval.files.records import read_json
from llava.eval.files.writing import write_jsonl
from llava.program_parser import ProgramParser

SUFFIX = "\nAnswer the question using a single word or phrase."


def convert(content: dict) -> list[dict]:
    """Returns the question lines; images are named as COCO names them."""
    split = content["data_subtype"]
    return [
        {
            "question_id": record["question_id"],
            "image": f"COCO_{split}_{record['image_id']:012d}.jpg",
            "text": record["question"] + SUFFIX,
            "category": "default",
        }
        for record in content["questions"]
    ]


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--src", required=True, help="v2_OpenEnded_mscoco_val2014_questions.json")
    parser.add_argument("--dst", required=True, help="question file to write")
    args = parser.parse_args()
    write_jsonl(convert(read_json(args.src)), args.dst)


if __name__ == "__main__":
    main()
