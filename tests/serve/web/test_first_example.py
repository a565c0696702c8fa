"""The first example of the page is one on which the method chosen first visibly works."""

import re

import pytest

pytest.importorskip("gradio")

from llava import playground as shipped  # noqa: E402
from llava.conversation import conv_templates  # noqa: E402
from llava.mm_utils import (  # noqa: E402
    get_model_name_from_path,
    process_images,
    tokenizer_image_token,
)
from llava.model.builder import load_pretrained_model  # noqa: E402
from llava.pruning import DEFAULT_METHOD, build_pruner, trace_pruning  # noqa: E402
from llava.serve.web.examples import examples  # noqa: E402
from playground.make_data import held_out  # noqa: E402


@pytest.mark.skipif(
    not (shipped.ROOT / shipped.CHECKPOINT / "config.json").is_file(),
    reason="needs the playground checkpoint",
)
def test_it_keeps_the_thing_that_the_question_is_about_and_answers_rightly():
    example = examples()[0]
    scene = held_out(int(re.search(r"scene_(\d+)", example.path)[1]))
    (thing,) = [t for t in scene.things if f"the {t.kind}?" in example.question]
    path = shipped.default_model_path()
    pruner = build_pruner(DEFAULT_METHOD)
    name = get_model_name_from_path(path)
    tokenizer, model, processor, _ = load_pretrained_model(
        path, None, name, device="cpu", pruner=pruner
    )
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{example.question}")
    conversation.append_message(conversation.roles[1], None)
    prompt = conversation.get_prompt()
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    image = example.picture.convert("RGB")
    pixels = process_images([image], processor, model.image_settings).to(model.dtype)
    with trace_pruning(model) as trace:
        answer = model.generate(ids, images=pixels, image_sizes=[image.size], max_new_tokens=4)
    assert tokenizer.decode(answer[0], skip_special_tokens=True).strip() == thing.color

    left, top, right, bottom = thing.box
    side = image.width / 24  # of a patch
    wanted = {
        24 * row + column
        for row in range(24)
        for column in range(24)
        if left <= (column + 0.5) * side <= right and top <= (row + 0.5) * side <= bottom
    }
    assert wanted and wanted <= set(trace.visual_positions[0].tolist())
