"""Chat about an image in the terminal; answers appear as they are written.

    python -m llava.serve.cli --model-path liuhaotian/llava-v1.5-7b --image-file view.jpg

An empty line or Ctrl-D ends the chat.
"""

from __future__ import annotations

import argparse
import io
import sys

import torch
from transformers import TextStreamer

from llava.conversation import Conversation, conv_templates
from llava.errors import errors_as_messages
from llava.eval.run_llava import (
    add_model_args,
    image_inputs,
    image_mark,
    load_model,
    sampling,
)
from llava.mm_utils import load_image, tokenizer_image_token
from llava.model_args import add_option
from llava.playground import default_image

#: what the playground's model was taught, in words about its first picture
PLAYGROUND_QUESTIONS = (
    "What color is the ring?",
    "Is there a red ring in the image?",
    "Describe the image.",
)


class Chat:
    """A dialogue about one image. Whatever the user types is text, `<image>` included.

    images: the arguments of `generate` that carry the image
    """

    def __init__(self, tokenizer, model, conversation: Conversation, images: dict, options: dict):
        self.tokenizer, self.model = tokenizer, model
        self.conversation, self.images, self.options = conversation, images, options

    @torch.inference_mode()
    def ask(self, question: str, streamer=None) -> str:
        """The answer to the next question, given all before it.

        A question that cannot be answered raises, and is as if it had not been asked.
        """
        roles, messages = self.conversation.roles, self.conversation.messages
        first = len(messages) == self.conversation.offset
        text = f"{image_mark(self.model.config)}\n{question}" if first else question
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
        ids = tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt", num_images=1)
        output = self.model.generate(
            ids[None].to(self.model.device),
            questions=[question],
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=streamer,
            **self.images,
            **self.options,
        )
        # End marks in the history would end every later answer, too.
        return self.tokenizer.decode(output[0], skip_special_tokens=True).strip()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_option(parser, "--image-file", help="file or URL (default: one of the playground)")
    add_option(parser, "--temperature", type=float, default=0.2, help="0: no sampling")
    add_option(parser, "--top-p", type=float)
    add_option(parser, "--max-new-tokens", type=int, default=512)
    add_option(parser, "--debug", action="store_true", help="print prompts and raw answers")
    add_model_args(parser)
    parser.set_defaults(num_beams=1)  # a beam cannot be streamed
    return parser


def open_chat(args) -> Chat:
    """Loads image and model."""
    name = args.image_file or default_image()
    image = load_image(name)
    tokenizer, model, image_processor, conv_mode = load_model(args)
    print(f"Image: {name}")
    if args.model_path is None:
        print(f"The playground knows little more than: {'; '.join(PLAYGROUND_QUESTIONS)}")
        print("It often gets a second question wrong: end with an empty line and start anew.")
    images = image_inputs([image], image_processor, model)
    return Chat(tokenizer, model, conv_templates[conv_mode].copy(), images, sampling(args))


def read_question(role: str) -> str:
    """What the user types; "" at the end of the input."""
    try:
        return input(f"{role}: ").strip()
    except EOFError:
        return ""


@errors_as_messages()
def main() -> None:
    args = build_parser().parse_args()
    chat = open_chat(args)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a broken character is no reason to stop
    user, assistant = chat.conversation.roles
    while question := read_question(user):
        print(f"{assistant}: ", end="", flush=True)
        streamer = TextStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
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
