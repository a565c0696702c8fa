"""Prompt templates: how a dialogue becomes the text that a checkpoint was trained on."""

import base64
import html
import io
from dataclasses import dataclass, field
from enum import Enum, auto

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.image_io import displayed, expand2square, resized_square

# Mean colour of the images CLIP was trained on, 0 to 255; padding with it adds no contrast.
PAD_COLOR = (122, 116, 104)
RESIZED_SIDE = 336  # pixels, for the mode "Resize"


class SeparatorStyle(Enum):
    """How system text, roles and messages are strung together."""

    SINGLE = auto()  # "role: text" and always the same separator
    TWO = auto()  # "role: text" and another separator after the answers
    MPT = auto()  # role and text without a colon
    PLAIN = auto()  # texts only
    LLAMA_2 = auto()  # [INST] question [/INST] answer


@dataclass
class Conversation:
    """A dialogue in one template. The templates are shared: work on `copy()`.

    system:    text in front of the dialogue
    roles:     names of the user and of the assistant
    messages:  [role, text] per turn. Text None or "" is the turn to be generated; a tuple
               (text, PIL image, image_process_mode) brings an image along
    offset:    number of preset messages, which are part of the prompt but not shown
    sep, sep2: separators; what each is for depends on `sep_style`
    version:   family of the template; "mmtag" in it wraps the image in <Image> tags
    skip_next: the demo's mark for a turn that must not be answered
    """

    system: str
    roles: tuple[str, str]
    messages: list = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def get_prompt(self) -> str:
        """The whole dialogue as one text, which ends where the model has to continue."""
        return _FORMATS[self.sep_style](self, self._texts())

    def append_message(self, role: str, message) -> None:
        self.messages.append([role, message])

    def copy(self) -> "Conversation":
        """A conversation of its own, with messages that can be changed."""
        return Conversation(
            system=self.system,
            roles=self.roles,
            messages=[[role, message] for role, message in self.messages],
            offset=self.offset,
            sep_style=self.sep_style,
            sep=self.sep,
            sep2=self.sep2,
            version=self.version,
        )

    def dict(self) -> dict:
        """What belongs into a log: everything but the images."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, _text(message)] for role, message in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }

    def process_image(
        self,
        image: Image.Image,
        image_process_mode: str,
        return_pil: bool = False,
        image_format: str = "PNG",
        max_len: int = 1344,
        min_len: int = 672,
    ):
        """Prepares an uploaded image for sending: upright, transparent parts on white.

        image_process_mode: "Pad" to a square, "Resize" to a small square, "Default" or "Crop"
                            leave the shape alone
        max_len:            longer side in pixels above which the image is made smaller
        min_len:            upper limit of the shorter side of an image made smaller

        Returns a PIL image, or base64 text of the file in `image_format`.
        """
        image = displayed(image)
        if image_process_mode == "Pad":
            side = max(image.size)
            if side > max_len:  # both steps in one, without the large square
                side, _ = _reduced_size((side, side), max_len, min_len)
                image = resized_square(image, PAD_COLOR, side)
            image = expand2square(image, PAD_COLOR)
        elif image_process_mode == "Resize":
            image = image.resize((RESIZED_SIDE, RESIZED_SIDE))
        elif image_process_mode not in ("Default", "Crop"):
            raise ValueError(
                f"Invalid image_process_mode: {image_process_mode}, "
                "choose from Pad, Resize, Default, Crop"
            )
        if max(image.size) > max_len:
            image = image.resize(_reduced_size(image.size, max_len, min_len))
        return image if return_pil else _to_base64(image, image_format)

    def get_images(self, return_pil: bool = False) -> list:
        """The images of the dialogue in order, as PIL images or as base64 PNG files."""
        return [
            self.process_image(message[1], message[2], return_pil=return_pil)
            for _, message in self.messages[self.offset :: 2]
            if isinstance(message, tuple)
        ]

    def to_gradio_chatbot(self) -> list[list]:
        """[user, assistant] pairs for a chat window; the user's text and image as safe HTML."""
        shown = [message for _, message in self.messages[self.offset :]]
        pairs = [[self._to_html(message), None] for message in shown[::2]]
        for pair, answer in zip(pairs, shown[1::2], strict=False):
            pair[1] = answer
        return pairs

    def _to_html(self, message):
        if not isinstance(message, tuple):
            return message and html.escape(message, quote=False)
        data = self.process_image(message[1], "Default", image_format="JPEG")
        tag = f'<img src="data:image/jpeg;base64,{data}" alt="user upload image" />'
        return tag + html.escape(_without_image_token(message[0]), quote=False)

    def _texts(self) -> list[tuple[str, str]]:
        """(role, text) per message, with the image token of a first image in its place."""
        turns = [(role, _text(message)) for role, message in self.messages]
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return turns
        role, text = turns[0]
        text = _without_image_token(text)
        if "mmtag" not in self.version:
            return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *turns[1:]]
        tagged = f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"
        return [(self.roles[0], tagged), (self.roles[1], "Received."), (role, text), *turns[1:]]


# One function per separator style; `turns` are (role, text), an empty text is left open.


def _format_single(conv, turns):
    parts = [f"{role}: {text}{conv.sep}" if text else f"{role}:" for role, text in turns]
    return conv.system + conv.sep + "".join(parts)


def _format_two(conv, turns):
    ends = (conv.sep, conv.sep2)
    parts = [
        f"{role}: {text}{ends[i % 2]}" if text else f"{role}:"
        for i, (role, text) in enumerate(turns)
    ]
    return conv.system + conv.sep + "".join(parts)


def _format_mpt(conv, turns):
    parts = [role + text + conv.sep if text else role for role, text in turns]
    return conv.system + conv.sep + "".join(parts)


def _format_plain(conv, turns):
    ends = (conv.sep, conv.sep2 or "")
    parts = [text + ends[i % 2] for i, (_, text) in enumerate(turns) if text]
    return conv.system + "".join(parts)


def _format_llama_2(conv, turns):
    if turns and (turns[0][0] != conv.roles[0] or not turns[0][1]):
        raise ValueError(
            f"a dialogue in this template starts with a text of {conv.roles[0]}, not {turns[0]}"
        )
    prompt = ""
    for i, (_, text) in enumerate(turns):
        if i == 0 and conv.system:
            text = f"<<SYS>>\n{conv.system}\n<</SYS>>\n\n{text}"
        if text and i % 2 == 0:
            prompt += f"{conv.sep}[INST] {text} [/INST]"
        elif text:
            prompt += f" {text} {conv.sep2}"
    # The tokenizer adds the first <s>. As published, `sep` counts as a set of characters here.
    return prompt.lstrip(conv.sep)


_FORMATS = {
    SeparatorStyle.SINGLE: _format_single,
    SeparatorStyle.TWO: _format_two,
    SeparatorStyle.MPT: _format_mpt,
    SeparatorStyle.PLAIN: _format_plain,
    SeparatorStyle.LLAMA_2: _format_llama_2,
}


def _text(message) -> str | None:
    return message[0] if isinstance(message, tuple) else message


def _without_image_token(text: str) -> str:
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def _reduced_size(size, max_len, min_len):
    ratio = max(size) / min(size)
    short = int(min(max_len / ratio, min_len, min(size)))
    long = int(short * ratio)
    width, height = size
    return (short, long) if height > width else (long, short)


def _to_base64(image, image_format):
    buffer = io.BytesIO()
    image.save(buffer, format=image_format)
    return base64.b64encode(buffer.getvalue()).decode()


# The templates. Their texts are part of the weights: not a blank may change.

_ANSWERS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_ANSWERS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_SEES_TAGGED_IMAGES = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
_SEES_IMAGES = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_LLAMA_2_SAFETY = (
    "You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, "
    "or illegal content. Please ensure that your responses are socially unbiased and positive "
    "in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead "
    "of answering something not correct. If you don't know the answer to a question, please "
    "don't share false information."
)
_PRESET_QUESTION = (
    "What are the key differences between renewable and non-renewable energy sources?"
)
_PRESET_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short "
    "amount of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy "
    "sources, on the other hand, are finite and will eventually be depleted, such as coal, oil, "
    "and natural gas. Here are some key differences between renewable and non-renewable energy "
    "sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas "
    "emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n"
)


def _template(system, roles, sep_style, sep, sep2=None, version="Unknown", messages=()):
    # A tuple, so that appending to a template that was not copied fails.
    return Conversation(
        system, roles, messages, len(messages), sep_style, sep, sep2, version=version
    )


_HUMAN = ("Human", "Assistant")
_USER = ("USER", "ASSISTANT")
_CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")
_SINGLE, _TWO, _MPT, _PLAIN, _LLAMA_2 = (
    SeparatorStyle[name] for name in ("SINGLE", "TWO", "MPT", "PLAIN", "LLAMA_2")
)

conv_vicuna_v0 = _template(
    _ANSWERS_HUMAN,
    _HUMAN,
    _SINGLE,
    "###",
    messages=((_HUMAN[0], _PRESET_QUESTION), (_HUMAN[1], _PRESET_ANSWER)),
)
conv_vicuna_v1 = _template(_ANSWERS_USER, _USER, _TWO, " ", "</s>", "v1")
conv_llama_2 = _template(_LLAMA_2_SAFETY, _USER, _LLAMA_2, "<s>", "</s>", "llama_v2")
conv_llava_llama_2 = _template(_SEES_IMAGES, _USER, _LLAMA_2, "<s>", "</s>", "llama_v2")
conv_mistral_instruct = _template("", _USER, _LLAMA_2, "", "</s>", "llama_v2")
conv_chatml_direct = _template(
    "<|im_start|>system\nAnswer the questions.", _CHATML, _MPT, "<|im_end|>", version="mpt"
)
conv_mpt = _template(
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers.",
    _CHATML,
    _MPT,
    "<|im_end|>",
    version="mpt",
)
conv_qwen2_5_vl = _template(
    "<|im_start|>system\nYou are a helpful assistant.",
    _CHATML,
    _MPT,
    "<|im_end|>\n",
    version="qwen2_5_vl",
)
conv_llava_plain = _template("", ("", ""), _PLAIN, "\n")
conv_llava_v0 = _template(_ANSWERS_HUMAN, _HUMAN, _SINGLE, "###")
conv_llava_v0_mmtag = _template(_SEES_TAGGED_IMAGES, _HUMAN, _SINGLE, "###", version="v0_mmtag")
conv_llava_v1 = _template(_ANSWERS_HUMAN, _USER, _TWO, " ", "</s>", "v1")
conv_llava_v1_mmtag = _template(_SEES_TAGGED_IMAGES, _USER, _TWO, " ", "</s>", "v1_mmtag")

default_conversation = conv_vicuna_v1
conv_templates = {
    "default": conv_vicuna_v0,
    "v0": conv_vicuna_v0,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llama_2": conv_llama_2,
    "mistral_instruct": conv_mistral_instruct,
    "chatml_direct": conv_chatml_direct,
    "mistral_direct": conv_chatml_direct,
    "plain": conv_llava_plain,
    "v0_plain": conv_llava_plain,
    "llava_v0": conv_llava_v0,
    "v0_mmtag": conv_llava_v0_mmtag,
    "llava_v1": conv_llava_v1,
    "v1_mmtag": conv_llava_v1_mmtag,
    "llava_llama_2": conv_llava_llama_2,
    "mpt": conv_mpt,
    "qwen2_5_vl": conv_qwen2_5_vl,
}
