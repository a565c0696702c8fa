"""Chat about an image in the terminal; answers appear as they are written.

    python -m llava.serve.cli --model-path liuhaotian/llava-v1.5-7b --image-file view.jpg

An empty line or Ctrl-D ends the chat.
"""

from __future__ import annotations

import argparse
import io
import re
import sys

import torch

from llava.errors import errors_as_messages
from llava.front_end import FrontEnd
from llava.mm_utils import load_image
from llava.model.inputs import Picture
from llava.model_args import (
    add_asking_args,
    add_length_arg,
    add_sampling_args,
    load_front_end,
    sampling,
)
from llava.playground import default_image
from llava.program_parser import ProgramParser
from llava.serve.answer_text import AnswerStreamer

#: what the playground's model was taught, in words about its first picture
PLAYGROUND_QUESTIONS = (
    "What color is the ring?",
    "Is there a red ring in the image?",
    "Describe the image.",
)

#: around a role in templates that mark turns, such as that of Qwen2.5-VL
MARKS = re.compile(r"<\|\w+\|>")


class Chat:
    """A dialogue about one image. Whatever the user types is text, `<image>` included.

    options: the arguments of `generate` that choose tokens
    """

    def __init__(self, front: FrontEnd, picture: Picture, options: dict):
        self.front, self.picture, self.options = front, picture, options
        self.conversation = front.conversation()

    @torch.inference_mode()
    def ask(self, question: str, streamer=None) -> str:
        """The answer to the next question, given all before it.

        A question that cannot be answered raises, and is as if it had not been asked.
        """
        roles, messages = self.conversation.roles, self.conversation.messages
        first = len(messages) == self.conversation.offset
        text = self.front.mark + self.front.separator + question if first else question
        before = len(messages)
        self.conversation.append_message(roles[0], text)
        self.conversation.append_message(roles[1], None)
        try:
            answer = self._answer(question, streamer)
        except BaseException:
            del messages[before:]
            raise
        messages[-1][1] = answer
        return answer

    def _answer(self, question: str, streamer) -> str:
        prompt = self.conversation.get_prompt()
        # The mark of the image stands in front of everything typed.
        ids = self.front.encode(prompt, num_images=1)
        inputs = self.front.inputs([ids], [[self.picture]], [question])
        output = self.front.model.generate(**inputs, streamer=streamer, **self.options)
        # End marks in the history would end every later answer, too: decoded without them.
        return self.front.decode(output)[0]


def build_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(__doc__)
    parser.add_argument("--image-file", help="file or URL (default: one of the playground)")
    add_sampling_args(parser, beams=False)
    add_length_arg(parser, 512)
    parser.add_argument("--debug", action="store_true", help="print prompts and raw answers")
    add_asking_args(parser)
    parser.set_defaults(num_beams=1)  # a beam cannot be streamed
    return parser


def open_chat(args) -> Chat:
    """Loads image and model."""
    if args.image_file is not None and not args.image_file.strip():
        raise ValueError("--image-file is empty: name a file, or leave the option out")
    name = args.image_file or default_image()
    image = load_image(name)
    front = load_front_end(args)
    print(f"Image: {name}")
    if args.model_path is None:
        print(f"The playground knows little more than: {'; '.join(PLAYGROUND_QUESTIONS)}")
        print("It often gets a second question wrong: end with an empty line and start anew.")
    return Chat(front, front.picture(image), sampling(args))


def read_question(role: str) -> str:
    """What the user types; "" at the end of the input."""
    try:
        return input(f"{role}: ").strip()
    except EOFError:
        return ""


def label(role: str) -> str:
    """What stands before a turn in the terminal: the role without the marks of its template."""
    return MARKS.sub("", role).strip()


@errors_as_messages()
def main() -> None:
    args = build_parser().parse_args()
    chat = open_chat(args)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a broken character is no reason to stop
    user, assistant = map(label, chat.conversation.roles)
    while question := read_question(user):
        print(f"{assistant}: ", end="", flush=True)
        streamer = AnswerStreamer(chat.front.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            answer = chat.ask(question, streamer)
        except (ValueError, torch.cuda.OutOfMemoryError) as error:
            print(f"[this question cannot be answered: {error}]")
            continue
        if args.debug:
            print({"prompt": chat.conversation.get_prompt(), "outputs": answer})
    print("exit...")


if __name__ == "__main__":
    main()
