"""Mistakes in training data are found before the first step, with file, number and id."""

import json
import os
import random
import time
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import AutoTokenizer

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.train.data import LazySupervisedDataset
from llava.train.glimpse.data import read_datasets
from llava.train.samples import missing_files, read_rows
from tests.golden_data import GOLDEN


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(
        GOLDEN / "tiny-llava-v1.5", use_fast=False, model_max_length=128
    )


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def turns(*values, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


def good(**changes):
    sample = {"id": "g", "image": "a.png", "conversations": turns("<image>\nWhat?", "A cat.")}
    return {key: value for key, value in {**sample, **changes}.items() if value != "absent"}


def load(folder, samples, tokenizer, version="v1", skip=(), text=None, name="data.json", **args):
    (folder / name).write_text(json.dumps(samples) if text is None else text, encoding="utf-8")
    args = {"image_folder": str(folder), "is_multimodal": True, "tokens_per_image": 9, **args}
    conv = conv_templates[version]
    return LazySupervisedDataset(
        str(folder / name), tokenizer, SimpleNamespace(**args), conv, skip=skip
    )


WRONG = {
    "no mark": (good(conversations=turns("What?", "A cat.")), "no message holds <image>"),
    "two marks": (good(conversations=turns("<image>", "<image>")), "2 messages hold <image>"),
    "two images": (good(image=["a.png", "b.png"]), "has 2 images, but training takes one"),
    "an image of numbers": (good(image=7), "image is 7, expected a path"),
    "an empty path": (good(image=""), "image is '', expected a path"),
    "a missing file": (good(image="b.png"), "there is no file .*b.png"),
    "another key": (good(image="absent", images=["a.png"]), "key 'images' is not known"),
    "no conversations": (good(conversations="absent"), "has no conversations, only id, image"),
    "no messages": (good(conversations=[]), r"conversations is \[\], expected a list"),
    "not a message": (good(conversations=["Hi"]), "message 0 is 'Hi', expected an object"),
    "no value": (good(conversations=[{"from": "human"}]), "needs the keys 'from' and 'value'"),
    "a null answer": (good(conversations=turns("<image>", None)), "message 1 has the value None"),
    "another role": (
        good(conversations=turns("<image>", "Hi", roles=("human", "bot"))),
        "message 1 is from 'bot', expected human or gpt",
    ),
    "two questions": (
        good(conversations=turns("<image>", "What?", roles=("human", "human"))),
        "has no answer",
    ),
    "two answers": (
        good(conversations=[*turns("<image>", "Yes."), *turns("No.", "?", roles=("gpt", "human"))]),
        "message 2 is from 'gpt', expected 'human'",
    ),
    "a late system turn": (
        good(conversations=[*turns("<image>", "Yes."), {"from": "system", "value": "Be brief."}]),
        "message 2 is from 'system', which only the first may be",
    ),
    "not an object": ([1], "is a list, expected an object"),
    "a mark in the answer": (
        good(conversations=turns("What?", "<image> A cat.")),
        "<image> stands in an answer",
    ),
    "a folder": (good(image="."), "there is no file"),
    "half of a character": (
        good(conversations=turns("<image>\nWhat?", "A \ud800 cat.")),
        "message 1 holds half of a character",
    ),
    "an answer that is no number": (
        good(conversations=turns("<image>\nWhat?", float("nan"))),
        "message 1 has the value nan, expected text",
    ),
    "an answer beyond all numbers": (
        good(conversations=turns("<image>\nWhat?", 10**400)),
        "message 1 has the value 1000.*, expected text",
    ),
    "no words": (good(image="absent", conversations=turns("", " ")), "holds no words"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named_with_file_number_and_id(folder, tokenizer, case):
    sample, message = WRONG[case]
    named = " \\(id 'g'\\)" if isinstance(sample, dict) else ""
    with pytest.raises(ValueError, match=f"data.json: 1 of 2 .*\n  sample 1{named}: .*{message}"):
        load(folder, [good(), sample], tokenizer)


def test_a_template_that_begins_with_a_question_has_no_place_for_an_empty_one(folder, tokenizer):
    samples = [good(), good(image="absent", conversations=turns("", "Hi."))]
    with pytest.raises(ValueError, match="sample 1 .*begins with an empty question"):
        load(folder, samples, tokenizer, version="mistral_instruct")
    assert len(load(folder, samples, tokenizer)) == 2


def test_all_mistakes_are_counted_and_can_be_left_out(folder, tokenizer, caplog):
    samples = [good(id=i, image="b.png" if i % 2 else "a.png") for i in range(20)]
    with pytest.raises(ValueError, match="10 of 20 samples cannot be used:(\n.*){5}\n  and 5 more"):
        load(folder, samples, tokenizer)
    dataset = load(folder, samples, tokenizer, skip_bad_samples=True)
    assert [sample["id"] for sample in dataset.samples] == list(range(0, 20, 2))
    assert "they are left out" in caplog.text
    with pytest.raises(ValueError, match="none is left"):
        load(folder, samples[1::2], tokenizer, skip_bad_samples=True)


def test_numbers_are_those_of_the_file_after_samples_were_skipped(folder, tokenizer):
    samples = [good(image="b.png"), good(), good(image="b.png")]
    assert len(load(folder, samples, tokenizer, skip=[0, 2, 0])) == 1
    with pytest.raises(ValueError, match="1 of 2 samples .*\n  sample 2 "):
        load(folder, samples, tokenizer, skip=[0])
    with pytest.raises(ValueError, match="skip_samples 99: the data has 3 samples"):
        load(folder, samples, tokenizer, skip=[99])


def test_what_other_tools_write_is_accepted(folder, tokenizer):
    chat = [{"role": "user", "content": "<image>\nHow many?"}, {"role": "assistant", "content": 3}]
    samples = [
        good(),
        good(conversations=turns("<image>\nHow many?", 3, roles=("user", "assistant"))),
        good(conversations=chat),
        good(image=["a.png"]),
        good(image=None, conversations=turns("Hello", "Hi")),
    ]
    dataset = load(folder, samples, tokenizer)
    assert dataset.samples[1]["conversations"] == turns("<image>\nHow many?", "3")
    assert dataset.samples[2]["conversations"] == turns("<image>\nHow many?", "3")
    assert dataset.samples[3]["image"] == "a.png" and "image" not in dataset.samples[4]
    assert [n > 0 for n in dataset.modality_lengths] == [True] * 4 + [False]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"id": 1},\n {"id": 2}]'),
        ("a.jsonl", '{"id": 1}\n\n{"id": 2}\n'),
        ("a.json", '{"id": 1}\n{"id": 2}\n'),
    ],
)
def test_lists_lines_and_byte_order_marks_are_read(tmp_path, name, text, bom):
    (tmp_path / name).write_text(bom + text, encoding="utf-8")
    assert read_rows(str(tmp_path / name)) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "a.json is empty"),
        ("a.json", "[1, 2", "a.json is not JSON"),
        ("a.json", "[]", "a.json holds an empty list"),
        ("a.json", "[" * 100_000, "a.json is not JSON"),
        ("a.json", b'[{"id": "\xe9"}]', "a.json is not a text in UTF-8: .* at byte 9"),
        ("a.jsonl", '{"id": 1}'.encode("utf-16"), "a.jsonl is not a text in UTF-8"),
        ("a.json", f"[1{'0' * 5000}]", "a.json is not JSON: Exceeds the limit"),
        ("a.jsonl", f"1{'0' * 5000}", "a.jsonl, line 1 is not JSON: Exceeds the limit"),
        ("a.json", '{"id": 1}', "holds a dict, expected a list"),
        ("a.jsonl", '{"id": 1}\n{"id"\n', "a.jsonl, line 2 is not JSON"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_rows(str(tmp_path / name))


def test_oddities_are_counted_once_each(folder, tokenizer, caplog):
    plain = {"image": "absent", "id": "p"}
    samples = [
        good(),
        *[good(id=i, conversations=turns("<image>\nWhat?", "")) for i in range(3)],
        good(**plain, conversations=turns("Draw <image> in SVG.", "No.")),
        good(**plain, conversations=[{"from": "gpt", "value": "Hi"}, *turns("Hello", "Hi")]),
        good(**plain, conversations=turns("many words " * 100, "Lost.")),
    ]
    load(folder, samples, tokenizer)
    lines = [r.getMessage() for r in caplog.records if r.name == "llava.train.samples"]
    assert len(lines) == 4 and all("data.json" in line for line in lines)
    assert "samples with an empty answer: 3 of 7, first sample 1 (id 0)" in lines[0]
    assert "without an image hold <image>, read as text: 1 of 7" in caplog.text
    assert "begin with an answer, which is dropped: 1 of 7" in caplog.text
    assert "model_max_length 128 and teach nothing: 1 of 7, first sample 6" in caplog.text


@pytest.mark.parametrize(("tokens", "lost"), [(20, False), (60, True), (500, True)])
def test_an_answer_behind_the_tokens_of_its_image_is_cut_away(
    folder, tokenizer, caplog, tokens, lost
):
    long = good(conversations=turns("<image>\n" + "word " * 30, "Lost."))
    short = good(image="absent", conversations=turns("Hello", "Hi"))
    dataset = load(folder, [short, long], tokenizer, tokens_per_image=tokens)
    assert ("teach nothing: 1 of 2" in caplog.text) == lost
    ids, labels = (dataset._tokens(dataset.samples[1])[key] for key in ("input_ids", "labels"))
    first = (labels != IGNORE_INDEX).nonzero()[0, 0] + tokens - 1
    assert (int(first) >= 128) == lost
    with pytest.raises(ValueError, match="cuts away the answers of all 1 samples .*500 tokens"):
        load(folder, [long], tokenizer, tokens_per_image=500)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("version", ["v1", "llava_llama_2", "chatml_direct", "v0"])
def test_a_system_turn_takes_the_place_of_the_systems_prompt(
    folder, tokenizer, caplog, version, beside
):
    brief = {"from": "system", "value": "Be brief."}
    messages = [brief, *turns("<image>\nWhat?", "A cat.")]
    samples = [good(), good(system="Be brief.") if beside else good(conversations=messages)]
    dataset = load(folder, samples, tokenizer, version=version)
    assert "begin with a system turn, used as the system prompt: 1 of 2" in caplog.text
    usual, other = (dataset._tokens(sample) for sample in dataset.samples)
    texts = [
        tokenizer.decode([t for t in item["input_ids"].tolist() if t >= 0])
        for item in (usual, other)
    ]
    assert "brief" in texts[1] and "brief" not in texts[0] and "cat" in texts[1]
    if conv_templates[version].system.startswith("<|im_start|>"):
        assert "system" in texts[1].split("brief")[0]
    learned = [item["labels"][item["labels"] != IGNORE_INDEX].tolist() for item in (usual, other)]
    assert learned[0] == learned[1]


def test_captions_need_two_messages(folder, tokenizer):
    samples = [good(), good(conversations=turns("<image>", "A cat.", "<image>", "A dog."))]
    with pytest.raises(ValueError, match="sample 1 .*2 messages hold|plain template needs two"):
        load(folder, samples, tokenizer, version="plain")
    samples = [good(), good(conversations=turns("<image>", "A cat.", "More?", "No."))]
    with pytest.raises(ValueError, match="sample 1 .*the plain template needs two messages"):
        load(folder, samples, tokenizer, version="plain")


def test_captions_need_an_image(folder, tokenizer):
    samples = [good(), good(image=None)]
    with pytest.raises(ValueError, match="sample 1 .*has no image, which the plain template needs"):
        load(folder, samples, tokenizer, version="plain")


def test_a_model_without_eyes_is_given_no_images(folder, tokenizer):
    with pytest.raises(ValueError, match="1 of 1 samples have an image, .*--vision_tower"):
        load(folder, [good()], tokenizer, is_multimodal=False)


def test_missing_files_are_those_that_do_not_exist(tmp_path):
    (tmp_path / "many").mkdir()
    paths = [str(tmp_path / "many" / f"{i}.png") for i in range(300)]
    paths += [str(tmp_path / f"few//{i}.png") for i in range(3)]
    (tmp_path / "few").mkdir()
    there = random.Random(0).sample(paths, 150)
    for path in there:
        open(path, "w").close()
    assert missing_files(paths) == set(paths) - set(there)
    assert missing_files([str(tmp_path / "gone/a.png")] * 200) == {str(tmp_path / "gone/a.png")}


def test_a_large_file_is_checked_quickly_and_no_image_is_opened(folder, tokenizer, monkeypatch):
    (folder / "coco").mkdir()
    for i in range(200):
        open(folder / f"coco/{i}.jpg", "w").close()  # nothing that could be opened
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    talk = [f"Question number {i}, with some words in it?" for i in range(6)]
    samples = [
        good(image=f"coco/{i % 200}.jpg", conversations=turns("<image>\nWhat?", *talk, "Yes."))
        for i in range(10_000)
    ]
    start = time.process_time()
    assert len(load(folder, samples, tokenizer)) == 10_000
    assert time.process_time() - start < 5  # 0.1 s; 665,000 samples take 5 s


# --- questions with boxes -----------------------------------------------------------------------


def line(**changes):
    row = {"question": "What?", "answer": "A dog.", "image": "a.png", "dataset": "gqa"}
    row |= {"width": 8, "height": 8, "bboxs": [[0, 0, 4, 4]], **changes}
    return {key: value for key, value in row.items() if value != "absent"}


def read_boxes(folder, rows, name="boxes.jsonl"):
    os.makedirs(folder / "cot/gqa", exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "cot/gqa/a.png")
    (folder / name).write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows), "utf-8")
    return read_datasets(str(folder / name), str(folder), 42)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bboxs": "absent"}, "has no 'bboxs'"),
        ({"bboxs": [[0, 0, 4]]}, r"the box \[0, 0, 4\] is not four numbers"),
        ({"answer": None}, "answer is None, expected text"),
        ({"image": 3}, "image is 3, expected a path"),
        ({"dataset": None}, "dataset is None, expected a path"),
        ({"bboxs": None}, "bboxs is None, expected a list of boxes"),
        ({"bboxs": [0, 0, 4, 4]}, "the box 0 is not four numbers"),
        ({"bboxs": [[0, 0, float("nan"), 4]]}, "the box .* is not four numbers"),
        ({"bboxs": [[0, 0, 10**400, 4]]}, "the box .* is not four numbers"),
        ({"width": "8"}, r"width and height are \('8', 8\), expected numbers"),
        ({"question": "Is <image> here?"}, "question holds <image> amid its text"),
        ({"answer": "A \ud800"}, "answer holds half of a character"),
    ],
)
def test_a_mistake_in_boxes_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"boxes.jsonl: 1 of 2 .*\n  sample 1: .*{message}"):
        read_boxes(tmp_path, [line(), line(**changes)])


@pytest.mark.parametrize("row", [7, None, "text", [1]])
def test_a_line_that_is_no_object_is_named(tmp_path, row):
    with pytest.raises(ValueError, match="sample 1: is .*, expected an object"):
        read_boxes(tmp_path, [line(), row])


@pytest.mark.parametrize(
    ("image", "messages", "message"),
    [
        (["a", "b###5"], turns("Q", "A"), "the box 5 is not four numbers"),
        (["a", "b###["], turns("Q", "A"), "does not end in a box"),
        ([1, 2], turns("Q", "A"), r"image is \[1, 2\], expected"),
        (["a", "b###[0, 0, 1, 1]"], [], r"conversations is \[\], expected a list of messages"),
        (["a", "b###[0, 0, 1, 1]"], turns(None, "A"), "value is None, expected text"),
    ],
)
def test_a_mistake_in_conversations_with_boxes_is_named(tmp_path, image, messages, message):
    (tmp_path / "b.json").write_text(json.dumps([{"image": image, "conversations": messages}]))
    data = f"datasets: [{{json_path: {tmp_path}/b.json, mapper: cot_bench}}]"
    (tmp_path / "data.yaml").write_text(data)
    with pytest.raises(ValueError, match=f"b.json: 1 of 1 .*\n  sample 0: .*{message}"):
        read_datasets(str(tmp_path / "data.yaml"), str(tmp_path), 42)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "holds a list, expected keys with values"),
        ("datasets: [a", "data.yaml is not yaml"),
        ("datasets: a", "datasets is 'a', expected a list of data sets"),
        ("datasets: [a]", r"datasets is \['a'\], expected a list of data sets"),
        ("datasets: [{json_path: 5}]", "json_path is 5, expected text"),
        ("datasets: [{json_path: BOXES, sampling_strategy: 5}]", "sampling_strategy 5 is unknown"),
        ("datasets: [{json_path: BOXES, prompt: 'Look.'}]", "has no place for the question"),
    ],
)
def test_a_mistake_in_the_list_of_data_sets_is_named(tmp_path, text, message):
    read_boxes(tmp_path, [line()])
    (tmp_path / "data.yaml").write_text(text.replace("BOXES", str(tmp_path / "boxes.jsonl")))
    with pytest.raises(ValueError, match=message):
        read_datasets(str(tmp_path / "data.yaml"), str(tmp_path), 42)


def test_numbers_are_answers_and_what_is_odd_is_counted(tmp_path, caplog):
    rows = [line(answer=3), line(answer=" "), line(image="gone.png")]
    rows += [line(bboxs=[]), line(bboxs=[[4, 4, 0, 0]]), line(question="<image>\nWhat?")]
    samples = read_boxes(tmp_path, rows)
    assert [sample.answer for sample in samples] == ["3", *["A dog."] * 3]
    assert {sample.question for sample in samples} == {"What?"}
    assert "samples have an empty answer and are left out: 1 of 6, first sample 1" in caplog.text
    assert "samples have no box: no patch is wanted: 1 of 6, first sample 3" in caplog.text
    assert "samples have a box without area: 1 of 6, first sample 4" in caplog.text
    assert "1 of 5 samples are left out: their picture is missing" in caplog.text


@pytest.mark.parametrize(
    ("box", "why"),
    [
        ([8, 0, 12, 4], "outside of its picture"),
        ([-4, 0, 0, 4], "outside of its picture"),
        ([0.1, 0.1, 0.9, 0.9], "within the first pixel, as shares from 0 to 1 are"),
        ([4, 4, 4, 8], "without area"),
    ],
)
def test_a_box_that_marks_nothing_is_counted_and_a_file_of_them_refused(tmp_path, caplog, box, why):
    rows = [line(bboxs=[box]), line(bboxs=[box, [0, 0, 4, 4]]), line()]
    assert len(read_boxes(tmp_path, rows)) == 3
    assert f"samples have a box {why}: 2 of 3, first sample 0" in caplog.text
    with pytest.raises(ValueError, match=f"no box marks any .* first is {why}: is bbox_type xyxy"):
        read_boxes(tmp_path, [line(bboxs=[box]), line(bboxs=[box, box])])


def test_boxes_that_are_not_asked_for_may_mark_nothing(tmp_path):
    read_boxes(tmp_path, [line()])
    (tmp_path / "boxes.jsonl").write_text(json.dumps(line(bboxs=[[9, 9, 12, 12]])))
    entry = f"{{json_path: {tmp_path}/boxes.jsonl, mapper: cot_train_fullmask}}"
    (tmp_path / "data.yaml").write_text(f"datasets: [{entry}]")
    assert read_datasets(str(tmp_path / "data.yaml"), str(tmp_path), 42)[0].boxes is None
