"""The model worker: methods per request, streaming, aborts, the queue, and what it reports."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from llava.mm_utils import tokenizer_image_token
from llava.pruning import METHODS as ALL_METHODS
from llava.pruning import Pruner, build_pruner, trace_pruning
from llava.serve import engine as engine_module
from llava.serve.engine import Engine, Writer
from llava.serve.turns import FairLock
from llava.serve.worker_app import Places, worker_app
from tests.golden_cases import SHIPPED, locate
from tests.golden_checks.models import load_checkpoint, open_images, prepare
from tests.serve.serve_tools import (
    PROMPT,
    STREAM,
    ask,
    body,
    call,
    chunks_of,
    live,
    outcome,
    patient_post,
    wait_for,
)

NAME = "tiny-llava-v1.5"
FOLDER = SHIPPED / "llava-base"
METHODS = {
    "none": {"method": "none"},
    "early": {"method": "vispruner", "visual_token_num": 32},
    "late": {"method": "fastv", "visual_token_num": 16, "options": {"layer": 3}},
    "both": {
        "method": "divprune+fastv",
        "options": {"divprune_visual_token_num": 90, "fastv_visual_token_num": 20},
    },
}


@pytest.fixture(scope="module")
def parts():
    return load_checkpoint(NAME, FOLDER)


@pytest.fixture(scope="module")
def engine(parts):
    tokenizer, model, processor = parts
    model.pruner = build_pruner("none")
    end_mark = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = -1
    engine = Engine(tokenizer, model, processor, NAME, concurrency=4)
    really_close, engine.close = engine.close, lambda: None  # servers come and go, it stays
    yield engine
    really_close()
    model.generation_config.eos_token_id = end_mark
    model.pruner = build_pruner("none")


@pytest.fixture(scope="module")
def app(engine):
    return worker_app(engine, Places(20))


@pytest.fixture(scope="module")
def image():
    import base64

    return base64.b64encode(locate("img1_640x360.png", FOLDER).read_bytes()).decode()


def test_requests_with_different_methods_at_the_same_time_do_not_see_each_other(app, image):
    alone = [outcome(ask(app, images=[image], pruning=method)) for method in METHODS.values()]
    assert len({str(last["pruning_report"]) for last in alone}) == len(METHODS)
    with live(app) as address, ThreadPoolExecutor(len(METHODS)) as pool:

        def post(method):
            content = body(images=[image], pruning=method)
            return httpx.post(address + STREAM, json=content, timeout=60).content

        together = [outcome(chunks_of(data)) for data in pool.map(post, METHODS.values())]
    assert together == alone


def test_the_report_says_what_the_trace_says(app, image, parts):
    tokenizer, model, processor = parts
    report = ask(app, images=[image], pruning=METHODS["both"])[-1]["pruning_report"]
    model.pruner = build_pruner(METHODS["both"]["method"], **METHODS["both"]["options"])
    pixels, sizes = prepare(open_images(["img1_640x360.png"], FOLDER), model, processor)
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
    with trace_pruning(model) as trace:
        model.generate(ids, images=pixels, image_sizes=sizes, max_new_tokens=1, do_sample=False)
    model.pruner = build_pruner("none")
    assert report["images"][0]["kept"] == trace.visual_positions[0].tolist()
    assert report["tokens_per_layer"] == [int(tokens) for tokens in trace.visual_tokens]
    assert report["kv_bytes"] == trace.kv_bytes
    ((layer, left),) = report["images"][0]["layers"]
    assert layer == 2 and len(left) == 20 and set(left) < set(report["images"][0]["kept"])
    assert report["dense_tokens"] == report["images"][0]["total"] == 576
    assert report["grid"] == [[24, 24]]
    assert report["images"][0]["crops"][0] == pytest.approx([0, -0.38889, 1, 1.38889])


def test_dense_bytes_are_what_no_pruning_takes(app, image):
    dense = ask(app, images=[image])[-1]["pruning_report"]
    assert dense["kv_bytes"] == dense["dense_kv_bytes"] and dense["importance"] is None
    pruned = ask(app, images=[image], pruning=METHODS["early"])[-1]["pruning_report"]
    assert pruned["dense_kv_bytes"] == dense["kv_bytes"] > pruned["kv_bytes"]
    assert pruned["prefill_seconds"] > 0 and pruned["new_tokens"] == 4


def test_an_answer_names_the_keys_of_its_request_that_had_no_effect(app):
    chunks = ask(app, repetition_penalty=1.2, max_tokens=3, **{"k" * 99: None})
    names = ["k" * 64, "max_tokens", "repetition_penalty"]
    assert all(chunk["ignored"] == names for chunk in chunks)
    assert not any("ignored" in chunk for chunk in ask(app, question="Why?"))


def test_importance_comes_as_one_value_for_every_patch():
    from llava.pruning import PruningTrace
    from llava.serve.report import _importance

    trace = PruningTrace(visual_positions=[torch.tensor([3, -1, 0])])
    trace.importance = [torch.tensor([0.5, 9.0, float("nan")])]
    shape = {"grid": [2, 2], "crops": [[0, 0, 1, 1]]}
    assert _importance(trace, [shape]) == [[0.5] * 4]
    trace.importance = [torch.tensor([0.5, 9.0, 2.0])]
    assert _importance(trace, [shape]) == [[2.0, 0.5, 0.5, 0.5]]


def test_a_request_without_an_image_is_reported_without_images(app):
    report = ask(app)[-1]["pruning_report"]
    assert report["images"] == [] and report["dense_tokens"] == 0
    assert set(report["tokens_per_layer"]) == {0}


def test_only_the_last_chunk_has_a_report(app, image):
    chunks = ask(app, images=[image])
    assert ["pruning_report" in chunk for chunk in chunks] == [False] * 4 + [True]
    assert all(chunk["text"].startswith(PROMPT) for chunk in chunks)


def test_the_stop_text_ends_the_answer_and_is_cut_off(app):
    whole = ask(app, max_new_tokens=8)[-1]["text"]
    answer = whole[len(body()["prompt"]) :]
    stop = answer[4:6]
    chunks = ask(app, max_new_tokens=8, stop=stop)
    assert chunks[-1]["text"] == body()["prompt"] + answer[: answer.find(stop)]
    assert "pruning_report" in chunks[-1]


def test_the_status_lists_every_method_with_its_options(app):
    (reply,) = call(app, ("/worker_get_status", None))
    status = reply.json()
    listed = {method["name"]: method for method in status["pruning_methods"]}
    assert listed["vispruner"]["available"] and listed["vispruner"]["reason"] is None
    assert listed["vispruner"]["options"]["visual_token_num"] == 64
    places = [listed[name]["place"] for name in ("vispruner", "fastv", "nuwa", "none")]
    assert places == ["first", "second", None, None]
    assert status["model_names"] == [NAME] and status["queue_length"] == 0


def test_a_method_that_does_not_fit_is_listed_with_a_reason_but_no_path(anyres_model):
    from llava.serve.methods import MethodShelf, offer

    listing = offer(anyres_model, MethodShelf(anyres_model.pruner))
    reasons = {m["name"]: m["reason"] for m in listing if not m["available"]}
    assert reasons and all("/" not in reason for reason in reasons.values())
    assert anyres_model.pruner.name == "none"


REFUSED = {
    "an unknown method": ({"method": "magic"}, "unknown pruning method 'magic'"),
    "an unknown option": ({"method": "fastv", "options": {"x": 1}}, "unknown option 'x'"),
    "a budget above the patches": (
        {"method": "random", "visual_token_num": 577},
        "exceeds the 576 patches",
    ),
    "a budget for a method without": ({"method": "none", "visual_token_num": 3}, "unknown option"),
    "an option of another kind": (
        {"method": "fastv", "options": {"layer": "/etc/passwd"}},
        "takes a whole number",
    ),
    "a fraction for a count": ({"method": "vscan", "options": {"window": 1.5}}, "a whole number"),
    "a list for a number": ({"method": "random", "options": {"seed": [1, 2]}}, "a whole number"),
    "a number for a list": (
        {"method": "vscan", "options": {"layer_list": 3}},
        "a list, each a whole number",
    ),
    "nothing where a value must be": (
        {"method": "random", "options": {"seed": None}},
        "a whole number",
    ),
    "a folder of the server": ({"method": "twigvlm", "options": {"twig": 3}}, "the server's to"),
    "one of two methods": (
        {"method": "random+twigvlm", "options": {"twigvlm_twig": "x"}},
        "the server's to",
    ),
    "a layer that is not there": (
        {"method": "fastv", "options": {"layer": 99}},
        "below the 32 decoder",
    ),
}


@pytest.mark.parametrize("pruning, message", REFUSED.values(), ids=REFUSED.keys())
def test_a_method_that_cannot_be_used_is_refused_with_the_reason(app, image, pruning, message):
    (reply,) = call(app, (STREAM, body(images=[image], pruning=pruning)))
    (chunk,) = chunks_of(reply.content)
    assert reply.status_code == 400
    assert chunk["cause"] == "method_unavailable" and message in chunk["text"]
    assert "</s>" not in ask(app, images=[image])[-1]["text"]  # the next request is served


def test_methods_with_the_same_options_are_built_once(engine):
    from llava.serve.protocol import PruningRequest

    first, again = (engine.shelf.get(PruningRequest(method="random")) for _ in range(2))
    assert first is again
    other = engine.shelf.get(PruningRequest(method="random", options={"seed": 5}))
    assert other is not first and engine.shelf.get(None) is engine.shelf.default


class Trained(Pruner):
    """A method whose part is loaded when it is put on a model."""

    name = "trained"

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.module = torch.nn.Linear(1, 1)


def test_few_settings_of_a_method_with_trained_parts_are_alive_at_a_time(monkeypatch):
    from llava.serve import methods
    from llava.serve.errors import ServeError
    from llava.serve.protocol import PruningRequest

    monkeypatch.setattr(methods, "build_pruner", lambda name, **options: Trained(**options))
    monkeypatch.setattr(methods, "all_defaults", lambda name: {})
    shelf = methods.MethodShelf(build_pruner("none"))

    def get(seed):
        return shelf.get(PruningRequest(method="trained", options={"seed": seed}))

    for seed in range(50):  # nobody uses the earlier ones: they are forgotten
        get(seed)
    in_use = [get(seed) for seed in range(methods.TRAINED)]
    with pytest.raises(ServeError, match="in use") as refused:
        get(99)
    assert refused.value.cause == "busy"
    assert get(methods.TRAINED - 1) is in_use[-1]
    del refused  # its traceback holds the settings, too
    in_use.clear()
    assert get(99).seed == 99


def test_trained_methods_are_counted_in_combinations_too(monkeypatch):
    from llava.serve.errors import ServeError
    from llava.serve.methods import TRAINED, MethodShelf
    from llava.serve.protocol import PruningRequest

    shelf = MethodShelf(build_pruner("none"))

    def get(first):
        pruner = shelf.get(PruningRequest(method=f"{first}+twigvlm"))
        pruner.second.module = torch.nn.Linear(1, 1)
        return pruner

    names = ["random", "vispruner", "divprune", "pool", "hiprune"]
    in_use = [get(name) for name in names[:TRAINED]]
    with pytest.raises(ServeError, match="in use"):
        get(names[TRAINED])
    assert len(in_use) == TRAINED


def test_requests_use_the_trained_parts_the_worker_was_started_with(parts, app, image):
    from llava.serve.methods import MethodShelf, offer

    twig = str(SHIPPED / "twigvlm" / "twig_a_k2t3_random")
    _, model, _ = parts
    for shelf in (
        MethodShelf(build_pruner("none"), {"twigvlm": twig}),
        MethodShelf(build_pruner("twigvlm", twig=twig)),
        MethodShelf(build_pruner("random+twigvlm", twigvlm_twig=twig)),
    ):
        listed = {entry["name"]: entry for entry in offer(model, shelf)}
        assert listed["twigvlm"]["available"] and "twig" not in listed["twigvlm"]["options"]
        assert shelf.build("random+twigvlm").second.twig == twig
    assert not next(e for e in offer(model, MethodShelf(Pruner())) if e["name"] == "twigvlm")[
        "available"
    ]


def test_the_default_is_not_built_twice_for_a_request_that_names_it(engine):
    from llava.serve.methods import MethodShelf
    from llava.serve.protocol import PruningRequest

    default = build_pruner("vispruner", visual_token_num=32)
    request = PruningRequest(method="vispruner", visual_token_num=32)
    assert MethodShelf(default).get(request) is default


@pytest.mark.parametrize("name", [name for name in ALL_METHODS if name != "none"])
def test_every_method_streams_and_reports(name, app, engine, image):
    # Its random weights find all of an image important: a cap makes it drop some.
    pruner = build_pruner(name, **({"visual_token_num": 64} if name == "glimpseprune" else {}))
    pruner.use_random_parts(engine.model)
    before, engine.shelf.default = engine.shelf.default, pruner
    try:
        chunks = ask(app, images=[image], max_new_tokens=6)
    finally:
        engine.shelf.default = before
        engine.model.pruner = build_pruner("none")
    report = chunks[-1]["pruning_report"]
    assert report["method"] == pruner.name and report["new_tokens"] == 6
    assert min(report["tokens_per_layer"]) < report["dense_tokens"] == 576
    if name == "glimpseprune":
        assert len(report["importance"][0]) == 576
    assert chunks[-1]["text"].startswith(PROMPT) and len(chunks) > 2


@pytest.mark.parametrize("captures", [True, False])
def test_out_of_memory_is_said_and_the_worker_goes_on(app, engine, monkeypatch, captures):
    """Also where another thread captures a graph, and torch will not tidy up meanwhile."""

    def fail(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory at /secret/place")

    def tidy():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "generate", fail)
        if captures:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "empty_cache", tidy)
        (chunk,) = ask(app)
    assert chunk["cause"] == "out_of_memory" and chunk["error_code"] == 1
    assert "secret" not in chunk["text"]
    assert ask(app)[-1]["error_code"] == 0


def test_out_of_memory_while_a_request_is_prepared_is_said_too(app, engine, image, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: /secret/place")

    with monkeypatch.context() as patch:
        patch.setattr(engine.front, "picture", fail)
        (reply,) = call(app, (STREAM, body(images=[image])))
    (chunk,) = chunks_of(reply.content)
    assert (reply.status_code, chunk["cause"]) == (503, "out_of_memory")
    assert "secret" not in chunk["text"]


def test_an_unforeseen_error_is_named_by_its_request_alone(app, engine, monkeypatch, caplog):
    secret = "swordfish"

    def fail(*_, **__):
        raise RuntimeError(f"the prompt was: {secret}")

    monkeypatch.setattr(engine.model, "generate", fail)
    (reply,) = call(app, (STREAM, body()), **{"X-Request-Id": "my-number"})
    (chunk,) = chunks_of(reply.content)
    assert chunk["cause"] == "internal" and chunk["request_id"] == "my-number"
    assert secret not in chunk["text"] and secret not in caplog.text
    assert "request my-number: RuntimeError" in caplog.text


def test_a_text_waits_for_its_turn_with_signs_of_life(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "KEEP_ALIVE_SECONDS", 0.05)
    app = worker_app(engine, Places(2))
    engine.turns._lock.acquire()
    release = threading.Timer(600, engine.turns._lock.release)
    release.start()
    told = 0

    async def listening(scope, receive, send):
        async def heard(message):
            nonlocal told
            await send(message)
            told += bool(message.get("body"))
            if told == 2:  # it has its turn after two signs of life
                release.cancel()
                engine.turns._lock.release()

        await app(scope, receive, heard)

    async def prepared(request, request_id):
        return engine_module.Job(
            request,
            request_id,
            engine.turns.seat(engine.shelf.default),
            torch.tensor([1, 5]),
            {"input_ids": torch.tensor([[1, 5]])},
            2,
        )

    monkeypatch.setattr(engine, "prepare", prepared)
    chunks = ask(listening)
    assert [chunk["text"] for chunk in chunks[:2]] == [body()["prompt"]] * 2
    assert "pruning_report" in chunks[-1]


def test_an_aborted_request_stops_generating_and_frees_its_place(engine, image, monkeypatch):
    app, left, ends = worker_app(engine, Places(1)), threading.Event(), []
    writes = Writer.on_finalized_text

    def hesitating(writer, text, stream_end=False):
        ends.append(stream_end)
        writes(writer, text, stream_end)
        left.wait(600)  # else the answer might be over before its reader leaves

    monkeypatch.setattr(Writer, "on_finalized_text", hesitating)
    with live(app) as address:

        def queue():
            return patient_post(f"{address}/worker_get_status").json()["queue_length"]

        content = body(images=[image], max_new_tokens=1000)
        with httpx.stream("POST", address + STREAM, json=content, timeout=60) as reply:
            pieces = reply.iter_raw()  # kept: httpx hangs up when it is thrown away
            next(pieces)
            assert queue() == 1
            refused = httpx.post(address + STREAM, json=body(), timeout=60)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert chunks_of(refused.content)[0]["cause"] == "busy"
        left.set()
        wait_for(lambda: queue() == 0)
        wait_for(lambda: not engine.turns._lock._held)
        assert not any(ends)
        assert httpx.post(address + STREAM, json=body(), timeout=60).status_code == 200


def test_the_lock_is_given_in_the_order_of_asking():
    lock, order, threads = FairLock(), [], []
    lock.acquire()
    for number in range(5):

        def take(number=number):
            lock.acquire()
            order.append(number)
            lock.release()

        threads.append(threading.Thread(target=take))
        threads[-1].start()
        wait_for(lambda number=number: len(lock._waiting) == number + 1)
    lock.release()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "template, prompt",
    {
        "vicuna_v1": "A chat. USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:",
        "llava_v0": "A chat.###Human: What?###Assistant: A cat.###Human: Why?###Assistant:",
        "llava_llama_2": "[INST] <<SYS>>\nBe good.\n<</SYS>>\n\nWhat? [/INST] A cat. </s><s>"
        "[INST] Why? [/INST]",
        "chatml_direct": "<|im_start|>system\nAnswer.<|im_end|><|im_start|>user\nWhat?<|im_end|>"
        "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nWhy?<|im_end|>"
        "<|im_start|>assistant\n",
    }.items(),
)
def test_the_latest_question_is_found_in_the_prompt(template, prompt):
    from llava.conversation import conv_templates
    from llava.serve.dialogue import last_question, turns

    conversation = conv_templates[template]
    assert last_question(prompt, conversation) == "Why?"
    said = turns(prompt, conversation)
    assert [speaker for speaker, _ in said] == [0, 1, 0]
    assert said[1][1].startswith("A cat.")
