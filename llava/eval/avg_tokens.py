"""Mean share of an image's visual tokens that lies inside the boxes of its question.

python -m llava.eval.avg_tokens --model-path P --image-folder DIR benchmark/gqa.json ...

What a method would keep that knew the boxes of Visual-CoT: images are cut and laid out as the model
takes them, but it answers nothing. Ends with one line of JSON: set -> share.
"""

import json
import os
from collections.abc import Iterable

from llava.errors import errors_as_messages
from llava.eval import markdown
from llava.eval.answering.questions import Question, load_image, questions_of, subset
from llava.eval.benchmarks import viscot
from llava.front_end import FrontEnd
from llava.model_args import add_asking_args, load_front_end
from llava.program_parser import ProgramParser
from llava.pruning.frames import covered, image_frames


def share_in_boxes(question: Question, front: FrontEnd, folder: str) -> float:
    """Share of the tokens of a question's images. Raises ValueError when it has no boxes, or one
    beside its image."""
    if question.boxes is None:
        raise ValueError(f"{question}: no box is known for its image")
    inside = total = 0
    for name, boxes in zip(question.images, question.boxes, strict=True):
        image = front.picture(load_image(question, name, folder))
        cells = covered(boxes, image_frames(image.size, front.model), front.grid(image))
        if boxes and not cells.any():
            raise ValueError(f"{question}: its box {boxes[0]} lies beside the image {name}")
        inside, total = inside + int(cells.sum()), total + cells.numel()
    return inside / total


def mean_share(questions: Iterable[Question], front: FrontEnd, folder: str) -> float:
    shares = [share_in_boxes(question, front, folder) for question in questions]
    if not shares:
        raise ValueError("there are no questions")
    return sum(shares) / len(shares)


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("files", nargs="+", help="question files of Visual-CoT")
    parser.add_argument("--image-folder", default="", help="folder of the images")
    parser.add_argument("--limit", type=int, help="about so many questions, evenly spread")
    add_asking_args(parser)
    args = parser.parse_args()
    folder, front = os.path.expanduser(args.image_folder), load_front_end(args)
    found = {}
    for path in args.files:
        records = viscot.read(os.path.expanduser(path), folder)
        questions = questions_of(subset(records, args.limit), viscot.viscot_questions)
        name = os.path.splitext(os.path.basename(path))[0]
        found[name] = mean_share(questions, front, folder)
    rows = [(name, f"{100 * share:.2f} %") for name, share in found.items()]
    if len(found) > 1:
        rows.append(("mean", f"{100 * sum(found.values()) / len(found):.2f} %"))
    print(markdown.table(("set", "tokens inside boxes"), rows, "lr"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
