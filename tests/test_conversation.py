"""Templates against the recorded prompts; images inside a conversation."""

import base64
import io

import pytest
from PIL import Image

from llava.conversation import Conversation, SeparatorStyle, conv_templates, default_conversation
from tests.golden_data import golden_json

RECORDED = golden_json("llava-base/prompts.json")
CASES = [
    (template, dialogue)
    for template, record in RECORDED["templates"].items()
    for dialogue in record["dialogues"]
]


def start_dialogue(template, dialogue):
    conv = conv_templates[template].copy()
    for speaker, message in RECORDED["_dialogues"][dialogue]:
        message = tuple(message) if isinstance(message, list) else message
        conv.append_message(conv.roles[speaker == "assistant"], message)
    return conv


@pytest.fixture
def conv():
    return conv_templates["vicuna_v1"].copy()


def photo(size=(40, 20), mode="RGB"):
    return Image.new(mode, size)


@pytest.mark.parametrize(("template", "dialogue"), CASES)
def test_prompts_are_the_recorded_ones(template, dialogue):
    recorded = RECORDED["templates"][template]["dialogues"][dialogue]
    conv = start_dialogue(template, dialogue)
    if recorded.get("error") == "AssertionError":
        with pytest.raises(ValueError, match="starts with a text of USER"):
            conv.get_prompt()
    elif recorded.get("error") == "TypeError":
        # The release stumbled over sep2 = None here; it now means "nothing".
        conv.get_prompt()
    else:
        assert conv.get_prompt() == recorded["prompt"]


@pytest.mark.parametrize("template", RECORDED["templates"])
def test_template_fields_are_the_recorded_ones(template):
    recorded, conv = RECORDED["templates"][template], conv_templates[template]
    for name in ("system", "offset", "sep", "sep2", "version", "skip_next"):
        assert getattr(conv, name) == recorded[name], name
    assert list(conv.roles) == recorded["roles"]
    assert conv.sep_style is SeparatorStyle[recorded["sep_style"]]
    assert len(conv.messages) == recorded["n_messages"]


def test_templates_come_in_the_recorded_order():
    assert list(conv_templates) == [*RECORDED["templates"], "qwen2_5_vl"]
    assert default_conversation is conv_templates["vicuna_v1"]


def test_a_caption_for_pretraining_has_image_and_caption_only():
    assert start_dialogue("plain", "caption_pretrain").get_prompt() == (
        "<image>\na red circle above a table"
    )


def test_a_dialogue_must_not_start_with_the_assistant_in_instruction_templates():
    conv = conv_templates["mistral_instruct"].copy()
    conv.append_message(conv.roles[1], "Hello")
    with pytest.raises(ValueError, match="starts with a text of USER"):
        conv.get_prompt()


def test_get_prompt_leaves_the_messages_alone(conv):
    conv.append_message("USER", ("What?\n<image>", None, "Default"))
    assert conv.get_prompt() == conv.get_prompt()
    assert conv.messages == [["USER", ("What?\n<image>", None, "Default")]]


def test_a_copy_is_independent_and_forgets_skip_next(conv):
    conv.append_message("USER", "Hello")
    conv.skip_next = True
    copy = conv.copy()
    copy.messages[0][1] = "Bye"
    copy.append_message("ASSISTANT", None)
    assert conv.messages == [["USER", "Hello"]]
    assert copy.skip_next is False


def test_a_shared_template_refuses_messages():
    with pytest.raises(AttributeError):
        conv_templates["vicuna_v1"].append_message("USER", "Hello")


def test_dict_holds_texts_only(conv):
    conv.append_message("USER", ("Hello", photo(), "Pad"))
    conv.append_message("ASSISTANT", None)
    assert conv.dict() == {
        "system": conv.system,
        "roles": ("USER", "ASSISTANT"),
        "messages": [["USER", "Hello"], ["ASSISTANT", None]],
        "offset": 0,
        "sep": " ",
        "sep2": "</s>",
    }


@pytest.mark.parametrize("case", golden_json("llava-base/conversation_process_image.json"))
def test_process_image_makes_the_recorded_size(conv, case):
    image = Image.new("RGB", case["size"], (10, 20, 30))
    out = conv.process_image(image, case["mode"], return_pil=True)
    assert list(out.size) == case["out"]
    assert list(out.getpixel((0, 0))) == case["corner"]


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "CMYK", "LA"])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_process_image_encodes_every_color_mode(conv, mode, image_format):
    data = conv.process_image(photo(mode=mode), "Pad", image_format=image_format)
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.size, image.mode, image.format) == ((40, 40), "RGB", image_format)


def test_process_image_rejects_an_unknown_mode(conv):
    with pytest.raises(ValueError, match="Invalid image_process_mode: Stretch"):
        conv.process_image(photo(), "Stretch")


def test_get_images_returns_the_images_of_the_user_in_order(conv):
    conv.append_message("USER", ("first", photo((40, 20)), "Pad"))
    conv.append_message("ASSISTANT", "I see.")
    conv.append_message("USER", "no image")
    conv.append_message("ASSISTANT", "Right.")
    conv.append_message("USER", ("second", photo((10, 30)), "Default"))
    assert [image.size for image in conv.get_images(return_pil=True)] == [(40, 40), (10, 30)]
    assert all(isinstance(data, str) for data in conv.get_images())


def test_preset_messages_are_not_shown():
    conv = conv_templates["v0"].copy()
    conv.append_message("Human", "Hello")
    conv.append_message("Assistant", None)
    assert conv.to_gradio_chatbot() == [["Hello", None]]
    assert conv.get_images() == []


def test_text_of_the_user_cannot_become_html(conv):
    attack = "<script>alert(1)</script>"
    conv.append_message("USER", (f"<image>\n{attack}", photo(mode="RGBA"), "Default"))
    conv.append_message("ASSISTANT", "No.")
    conv.append_message("USER", attack)
    conv.append_message("ASSISTANT", None)
    (first, answer), (second, open_answer) = conv.to_gradio_chatbot()
    tag, _, text = first.partition("/>")
    assert tag.startswith('<img src="data:image/jpeg;base64,')
    assert tag.endswith('alt="user upload image" ')
    assert text == second == "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert (answer, open_answer) == ("No.", None)


def test_fields_come_in_the_order_callers_rely_on():
    assert list(Conversation.__dataclass_fields__) == [
        "system",
        "roles",
        "messages",
        "offset",
        "sep_style",
        "sep",
        "sep2",
        "version",
        "skip_next",
    ]
