"""Turns an annotation file of VizWiz into a question file.

python scripts/convert_vizwiz_to_llava.py --annotation-file vizwiz/val.json \
    --dst vizwiz/llava_val.jsonl

With it `SPLIT=val bash scripts/v1_5/eval/vizwiz.sh` scores the validation split here; the server of
the test split is reported closed.
"""

from llava.errors import errors_as_messages
from llava.eval.files.records import read_json_list
from llava.eval.files.writing import write_jsonl
from llava.program_parser import ProgramParser

SUFFIX = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)


def convert(records: list[dict]) -> list[dict]:
    """Returns the question lines, numbered from 0 like those of the test split."""
    return [
        {
            "question_id": number,
            "image": record["image"],
            "text": record["question"] + SUFFIX,
            "category": "default",
        }
        for number, record in enumerate(records)
    ]


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--annotation-file", required=True, help="val.json or test.json")
    parser.add_argument("--dst", required=True, help="question file to write")
    args = parser.parse_args()
    records = read_json_list(args.annotation_file, ("image", "question"))
    write_jsonl(convert(records), args.dst)


if __name__ == "__main__":
    main()
