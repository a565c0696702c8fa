"""The parts of the web page without a browser and without gradio."""

import asyncio
import io
import json
import socket
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

import httpx  # noqa: E402

from llava.conversation import conv_templates  # noqa: E402
from llava.serve.web import asking  # noqa: E402
from llava.serve.web.client import Service  # noqa: E402
from llava.serve.web.failures import SENTENCES, Failure  # noqa: E402
from llava.serve.web.insight import insight  # noqa: E402
from llava.serve.web.log import ConversationLog  # noqa: E402
from llava.serve.web.methods import (  # noqa: E402
    followers,
    largest_budget,
    offered,
    pruning_request,
)
from llava.serve.web.pictures import IMPORTANCE, stages  # noqa: E402
from llava.serve.web.report import read_report  # noqa: E402
from llava.serve.web.templates import choices, stop_of, template_of  # noqa: E402
from llava.serve.web.uploads import Refused, check_image, checked_upload  # noqa: E402
from tests.serve.web.web_service import (  # noqa: E402
    DENSE,
    GRID,
    METHODS,
    MODEL,
    make_report,
)

GREY = Image.new("RGB", (120, 120), (200, 200, 200))


def settings(**values) -> asking.Settings:
    return asking.Settings(MODEL, **values)


def conversation_about(text: str, image=GREY, mode: str = "Default"):
    conversation = asking.new_conversation(settings())
    asking.add_question(conversation, text, image, mode)
    return conversation


def collect(service: Service, text: str, **values) -> list[asking.Answer]:
    async def run():
        answers = asking.ask(service, conversation_about(text), settings(**values), "r1")
        return [answer async for answer in answers]

    return asyncio.run(run())


def failure_of(service: Service, text: str, **values) -> Failure:
    with pytest.raises(Failure) as caught:
        collect(service, text, **values)
    return caught.value


# Controller and workers.


def test_an_answer_streams_and_ends_with_its_report(fake):
    answers = collect(Service(fake.url), "Hello")
    texts = [answer.text for answer in answers]
    assert texts[-1].split() == [f"word{n}" for n in range(10)]
    assert all(longer.startswith(text) for text, longer in zip(texts, texts[1:], strict=False))
    assert answers[-1].report.dense_tokens == DENSE
    assert all(answer.report is None for answer in answers[:-1])


def test_the_request_is_the_documented_body(fake):
    pruning = {"method": "vispruner", "visual_token_num": 4, "options": {}}
    collect(Service(fake.url), "Hello <image> you", pruning=pruning, max_new_tokens=0)
    body = fake.bodies[-1]
    assert body["prompt"].endswith("USER: <image>\nHello  you ASSISTANT:")
    assert body["prompt"].count("<image>") == len(body["images"]) == 1
    assert body["stop"] == "</s>" and body["max_new_tokens"] == 1 and body["pruning"] == pruning
    assert body["question"] == "Hello  you"
    assert fake.headers[-1]["user-agent"] == "LLaVA Client"
    assert fake.headers[-1]["x-request-id"] == "r1"


def test_numbers_of_a_request_stay_in_their_ranges():
    wild = settings(temperature=99, top_p=-1, max_new_tokens=10**9)
    body = asking.request_body(conversation_about("Hi"), wild)
    assert (body["temperature"], body["top_p"], body["max_new_tokens"]) == (1.0, 0.0, 1536)


def test_long_questions_are_cut():
    assert len(conversation_about("x" * 5000).messages[0][1][0]) == 1200 + len("\n<image>")
    assert len(conversation_about("x" * 5000, image=None).messages[0][1]) == 1536


def test_the_token_travels_with_every_request(fake):
    service = Service(fake.url, token="0123456789abcdef")
    asyncio.run(service.models())
    collect(service, "Hello")
    assert fake.headers[-1]["authorization"] == "Bearer 0123456789abcdef"


def test_models_are_sorted_important_ones_first(fake):
    fake.models = ["zebra", "vicuna-13b", "albatross"]
    try:
        assert asyncio.run(Service(fake.url).models()) == ["vicuna-13b", "albatross", "zebra"]
    finally:
        fake.models = [MODEL]


def test_a_worker_that_dies_in_the_middle_is_named_as_the_cause(fake):
    failure = failure_of(Service(fake.url), "crash")
    assert failure.cause == "worker_lost" and "Regenerate" in failure.sentence


def test_an_error_chunk_shows_the_sentence_of_the_worker(fake):
    failure = failure_of(Service(fake.url), "broken")
    assert failure.cause == "out_of_memory" and failure.code == 1
    assert failure.text("r1") == (
        "The GPU has too little memory left for this image. (error_code: 1) "
        "[out_of_memory, request r1]"
    )


def test_a_full_worker_is_told_apart(fake):
    failure = failure_of(Service(fake.url), "full")
    assert (failure.cause, failure.sentence) == ("busy", "All slots are taken.")


def test_no_controller_no_worker_and_no_model_are_three_failures(fake):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(Failure) as caught:
        asyncio.run(Service(nobody).models())
    assert caught.value.cause == "no_controller" and "127.0.0.1" not in caught.value.text("r")
    with pytest.raises(Failure) as caught:
        asyncio.run(Service(fake.url).worker("other"))
    assert caught.value.cause == "no_worker" and "other" in caught.value.sentence
    with pytest.raises(Failure) as caught:
        asyncio.run(_first(asking.ask(Service(fake.url), None, asking.Settings(""), "r")))
    assert caught.value.cause == "no_model"


async def _first(answers):
    async for answer in answers:
        return answer


def replying(*replies):
    """A service whose network gives these answers in turn; what was asked is in `.asked`."""
    waiting, asked = list(replies), []

    def handle(request: httpx.Request):
        asked.append(str(request.url))
        reply = waiting.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    service = Service("http://controller:1", transport=httpx.MockTransport(handle))
    service.asked = asked
    return service


def at(address: str):
    return httpx.Response(200, json={"address": address})


def stream(text: str):
    return httpx.Response(200, content=json.dumps({"text": text, "error_code": 0}) + "\0")


@pytest.mark.parametrize("kind", [httpx.ConnectError, httpx.ConnectTimeout])
def test_a_worker_that_cannot_be_reached_is_replaced_by_another(kind):
    prompt = conversation_about("Hi").get_prompt()
    gone = kind("gone")  # its program ended, or its machine is off
    dropped = httpx.Response(200, json={"alive": False})
    service = replying(at("http://w1:1"), gone, dropped, at("http://w2:1"), stream(prompt + " yes"))
    assert [answer.text for answer in collect(service, "Hi")][-1] == "yes"
    assert "http://controller:1/report_worker" in service.asked
    assert [url for url in service.asked if "generate" in url] == [
        f"http://{name}:1/worker_generate_stream" for name in ("w1", "w2")
    ]


def test_redirects_are_not_followed():
    elsewhere = httpx.Response(302, headers={"location": "http://169.254.169.254/"})
    service = replying(at("http://w1:1"), elsewhere)
    assert failure_of(service, "Hi").code == 302
    assert not any("169.254" in url for url in service.asked)


@pytest.mark.parametrize("address", ["", "file:///etc/passwd", "ftp://x", "gopher://x"])
def test_addresses_of_other_schemes_are_no_workers(address):
    assert failure_of(replying(at(address)), "Hi").cause == "no_worker"


@pytest.mark.parametrize("content", ["nonsense\0", "[]\0", '{"text": 1}\0', "{}\0", '{"a":\0'])
def test_a_reply_of_another_kind_is_no_answer(content):
    reply = httpx.Response(200, content=content)
    assert failure_of(replying(at("http://w1:1"), reply), "Hi").cause == "worker_reply"


def test_sentences_name_no_addresses_and_can_be_acted_on():
    for cause, sentence in SENTENCES.items():
        assert "http" not in sentence and sentence.endswith("."), cause


# Templates and methods.


@pytest.mark.parametrize(
    "model, template",
    [
        ("llava-v1.5-7b", "vicuna_v1"),
        ("llava-v1.5-playground", "vicuna_v1"),
        ("llava-llama-2-13b", "llava_llama_2"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-mixtral-hermes", "chatml_direct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("LLaVA-7b-v0-mmtag", "v0_mmtag"),
        ("llava-v1-plain", "v1_mmtag"),
        ("llava-7b-v0", "llava_v0"),
        ("llava-mpt-7b", "mpt"),
        ("llama-2-7b-chat", "llama_2"),
        ("vicuna-13b", "vicuna_v1"),
    ],
)
def test_templates_follow_the_name_of_the_model(model, template):
    assert template_of(model) == template


def test_what_the_worker_says_of_its_template_wins_over_the_name():
    assert template_of("my-llava", known="mistral_instruct") == "mistral_instruct"
    assert template_of("my-llava", "mpt", known="mistral_instruct") == "mpt"
    assert template_of("llava-v0", known=None) == template_of("llava-v0", known="odd") == "llava_v0"
    assert template_of("llava-v0", known=["mpt"]) == "llava_v0"
    chosen = asking.Settings("my-llava", conv_mode="chatml_direct")
    assert asking.new_conversation(chosen).system == conv_templates["chatml_direct"].system


def test_a_chosen_template_is_taken_and_an_unknown_one_refused():
    assert template_of("llava-v1.5-7b", "mpt") == "mpt" and "mpt" in choices()
    with pytest.raises(ValueError, match="unknown template"):
        template_of("llava-v1.5-7b", "no")
    assert stop_of(conv_templates["vicuna_v1"]) == "</s>" and stop_of(conv_templates["mpt"])


METHODS_OFFERED = offered({"pruning_methods": METHODS})


def test_an_empty_option_box_leaves_the_default_to_the_method():
    assert pruning_request(METHODS_OFFERED, "vispruner", 4, ["", " "]) == {
        "method": "vispruner",
        "visual_token_num": 4,
        "options": {},
    }
    assert pruning_request(METHODS_OFFERED, "none", 4, [])["visual_token_num"] is None
    assert pruning_request({}, "vispruner", 4, []) is None


def test_option_texts_become_values_of_the_right_type():
    request = pruning_request(METHODS_OFFERED, "vispruner", 4, ["1", "(2, 3)"])
    assert request["options"] == {"important_ratio": 1.0, "seed": [2, 3]}
    with pytest.raises(Failure, match="important_ratio must be a number, not 'half'"):
        pruning_request(METHODS_OFFERED, "vispruner", 4, ["half"])
    with pytest.raises(Failure, match="longer than"):
        pruning_request(METHODS_OFFERED, "vispruner", 4, ["", "[" * 5000])


def test_two_methods_in_a_row_are_asked_for_by_their_names_and_options():
    assert followers(METHODS_OFFERED, "vispruner") == ["fastv"]
    assert followers(METHODS_OFFERED, "fastv") == followers(METHODS_OFFERED, "none") == []
    request = pruning_request(METHODS_OFFERED, "vispruner", 9, ["0.75", "", "3"], "fastv", 4)
    assert request == {
        "method": "vispruner+fastv",
        "visual_token_num": None,
        "options": {
            "vispruner_important_ratio": 0.75,
            "vispruner_visual_token_num": 9,
            "fastv_layer": 3,
            "fastv_visual_token_num": 4,
        },
    }
    with pytest.raises(Failure, match="its trained part is missing"):
        pruning_request(METHODS_OFFERED, "vispruner", 9, [], "twigvlm", 4)


def test_a_method_that_is_not_available_says_why():
    with pytest.raises(Failure, match="its trained part is missing"):
        pruning_request(METHODS_OFFERED, "twigvlm", 4, [])
    with pytest.raises(Failure):
        pruning_request(METHODS_OFFERED, "unheard-of", 4, [])


def test_the_slider_ends_at_the_dense_count():
    assert largest_budget(METHODS_OFFERED, 576) == 576
    assert largest_budget(METHODS_OFFERED, None) == 24


# Pictures and figures.


def report_of(method: str, tokens: int, **changes):
    body = {"images": ["x"], "pruning": {"method": method, "visual_token_num": tokens}}
    return read_report({**make_report(body), **changes})


def bright_cells(panel: Image.Image) -> set[int]:
    """Numbers of the patches that are not darkened."""
    pixels = np.asarray(panel.convert("L"), dtype=float)
    side = pixels.shape[0] // GRID
    cells = pixels[: side * GRID, : side * GRID].reshape(GRID, side, GRID, side)
    middle = cells[:, side // 3 : 2 * side // 3, :, side // 3 : 2 * side // 3].mean(axis=(1, 3))
    return set(np.flatnonzero(middle > 120).tolist())


def test_bright_patches_of_the_picture_are_those_of_the_report():
    report = report_of("vispruner", 9)
    [panel] = stages([GREY], report)[0].panels
    assert bright_cells(panel) == set(report.images[0].kept)


def test_every_layer_that_drops_tokens_has_a_picture():
    views = {view.title: view.panels for view in stages([GREY], report_of("fastv", 12))}
    assert list(views) == ["kept before the decoder", "from layer 2 on"]
    assert len(bright_cells(views["kept before the decoder"][0])) == DENSE
    assert bright_cells(views["from layer 2 on"][0]) == set(range(12))


def test_a_layer_that_drops_other_tokens_alone_has_no_picture():
    image = {"kept": [1, 2, 3], "total": DENSE, "layers": [[0, [1, 2, 3]], [4, [2]], [6, [2]]]}
    views = stages([GREY], report_of("fastv", 12, images=[image]))
    assert [view.title for view in views] == ["kept before the decoder", "from layer 4 on"]


def test_the_map_of_importance_goes_from_blue_to_red():
    view = stages([GREY], report_of("vispruner", 9))[-1]
    [panel] = view.panels
    assert view.title == IMPORTANCE
    first, last = np.asarray(panel)[5, 5], np.asarray(panel)[-6, -6]
    assert first[2] > first[0] + 60 and last[0] > last[2] + 60


def test_patches_lie_where_the_crop_of_the_report_lies():
    wide = Image.new("RGB", (200, 100), (200, 200, 200))
    images = [{**make_report({"images": ["x"]})["images"][0], "crops": [[0.25, 0, 0.75, 1]]}]
    [view] = stages([wide], report_of("none", None, images=images))
    [panel] = view.panels
    pixels = np.asarray(panel.convert("L"))
    assert pixels[100, 50] < 60 and pixels[100, 510] < 60 and pixels[140, 300] > 120


def test_the_panel_shows_figures_beside_the_dense_ones():
    shown = insight([GREY], report_of("vispruner", 9), dense_seconds=0.288)
    for text in ("72 ms", "dense 288 ms", "72 kB", "dense 288 kB", "dense 36", "−75 %"):
        assert text in shown, text
    assert "layers 0–7: 9" in shown and shown.count("data:image/jpeg") == 2
    late = insight([GREY], report_of("fastv", 12))
    assert "layers 0–1: 36, layers 2–7: 12" in late and "dense not measured" in late


def test_what_a_worker_says_cannot_put_markup_into_the_page():
    assert read_report(make_report({"images": []})) is None
    for broken in ({"images": 3}, {"images": [{}]}, {"tokens_per_layer": ["<script>"]}):
        assert report_of("none", None, **broken) is None
    shown = insight([GREY], report_of("<script>alert(1)</script>", 9))
    assert "<script" not in shown


# Uploads and logs.


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def form(name: str, data: bytes, extra: bytes = b"") -> tuple[str, bytes]:
    head = f'Content-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = b"--xyz\r\n" + head.encode() + data + b"\r\n" + extra + b"--xyz--\r\n"
    return "multipart/form-data; boundary=xyz", body


def test_a_small_image_may_be_uploaded():
    checked_upload(*form("view.png", png(30, 20)))


@pytest.mark.parametrize(
    "name, data",
    [
        ("a" * 300 + ".png", png(9, 9)),
        ("a" * 5_000_000 + ".png", png(9, 9)),
        ("../../page.png", png(9, 9)),
        ("page.html", png(9, 9)),
        ("page.svg", b"<svg/>"),
        ("bomb.png", png(9000, 9000)),
        ("line.png", png(8000, 8)),
        ("text.png", b"hello"),
        ("", png(9, 9)),
    ],
)
def test_other_uploads_are_refused(name, data):
    with pytest.raises(Refused) as caught:
        checked_upload(*form(name, data))
    assert 400 <= caught.value.status < 500


def test_one_upload_holds_one_file():
    second = b"--xyz\r\nContent-Disposition: form-data; name=x\r\n\r\ny\r\n"
    with pytest.raises(Refused):
        checked_upload(*form("view.png", png(9, 9), second))
    with pytest.raises(Refused):
        checked_upload("text/plain", b"")


@pytest.mark.parametrize(
    "kind, sentence",
    [
        ("Multipart/Form-Data; Boundary=xyz", None),
        ('multipart/form-data; charset=utf-8; boundary="xyz"', None),
        ("multipart/form-data;boundary=xyz; charset=utf-8", None),
        ("multipart/form-data", "what separates its parts"),
        ('multipart/form-data; boundary="xyz', "what separates its parts"),
        ("multipart/form-data; boundary=xyz; boundary=abc", "what separates its parts"),
        ("application/json; boundary=xyz", "must be a multipart form"),
    ],
)
def test_the_header_of_a_form_may_have_every_lawful_spelling(kind, sentence):
    body = form("view.png", png(9, 9))[1]
    if sentence is None:
        assert checked_upload(kind, body)[0] == ".png"
    else:
        with pytest.raises(Refused, match=sentence):
            checked_upload(kind, body)


def test_a_bomb_is_refused_by_its_header():
    bomb = bytearray(png(10, 10))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(Refused, match="million pixels"):
        check_image(bytes(bomb))


def test_nothing_is_written_unless_asked_for(tmp_path):
    log = ConversationLog(tmp_path)
    log.vote("upvote", MODEL, conversation_about("secret"), "1.2.3.4")
    log.chat(MODEL, conversation_about("secret"), 0.0, "1.2.3.4")
    assert not list(tmp_path.iterdir())


def test_asked_for_logs_have_the_published_layout(tmp_path):
    log = ConversationLog(tmp_path, texts=True, keep_images=True)
    log.chat(MODEL, conversation_about("Hi"), 1.23456789, "1.2.3.4")
    log.vote("flag", MODEL, conversation_about("Hi"), "1.2.3.4")
    [file] = tmp_path.glob("*-conv.json")
    chat, vote = map(json.loads, file.read_text().splitlines())
    assert list(chat) == ["tstamp", "type", "model", "start", "finish", "state", "images", "ip"]
    assert chat["type"] == "chat" and chat["start"] == 1.2346
    assert list(vote) == ["tstamp", "type", "model", "state", "ip"] and vote["type"] == "flag"
    assert list(tmp_path.glob(f"serve_images/*/{chat['images'][0]}.jpg"))


def test_a_share_of_tokens_takes_the_place_of_the_number_where_the_method_knows_it():
    own = dict(options={"visual_token_num": 9, "visual_token_ratio": None, "seed": None})
    entries = [
        {"name": "vispruner", "place": "first", **own},
        {"name": "fastv", "place": "second", **own},
        {"name": "prumerge", "place": "first", "options": {"visual_token_num": 9}},
    ]
    methods = offered({"pruning_methods": entries})
    ask = {"budget": 22.2, "texts": ["3"], "shares": True}
    assert pruning_request(methods, "vispruner", **ask) == {
        "method": "vispruner",
        "visual_token_num": None,
        "options": {"visual_token_ratio": 0.222, "seed": 3},
    }
    assert pruning_request(methods, "vispruner", 20, [])["options"] == {}
    chain = pruning_request(methods, "vispruner", then="fastv", then_budget=50, **ask)
    assert chain["visual_token_num"] is None and chain["options"] == {
        "vispruner_visual_token_ratio": 0.222,
        "vispruner_seed": 3,
        "fastv_visual_token_ratio": 0.5,
    }
    number = pruning_request(methods, "prumerge", 20, [], shares=True)
    assert number == {"method": "prumerge", "visual_token_num": 20, "options": {}}
    assert pruning_request(methods, "vispruner", None, [], shares=True)["options"] == {}
