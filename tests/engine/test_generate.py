"""A model whose decoder layers run in a server answers as the whole model does."""

from __future__ import annotations

import threading

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, TextStreamer

from llava.engine import EngineError, VLLMEngine
from llava.front_end import FrontEnd
from llava.mm_utils import KeywordsStoppingCriteria
from llava.model.context import PromptTooLong
from llava.pruning import METHODS, build_pruner, trace_pruning
from llava.pruning.testing.tiny import make_pruner
from llava.pruning.tokens import KEY_BIAS
from tests.engine.stub_vllm import stub_vllm, wait_until
from tests.model.checkpoint_tools import CHECKPOINT, load
from tests.paths import GOLDEN

IMAGES = [
    Image.open(GOLDEN / "images" / name).convert("RGB")
    for name in ("img0_336x336.png", "img1_640x360.png")
]
NEW = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def whole():
    """A front end whose model has its decoder."""
    return front_of(load(CHECKPOINT))


@pytest.fixture(scope="module")
def server(whole):
    with stub_vllm(load(CHECKPOINT)[1]) as server:
        yield server


@pytest.fixture(scope="module")
def remote(server):
    """The same without, on that server."""
    return front_of(load(CHECKPOINT, engine=VLLMEngine(server.url)))


@pytest.fixture(autouse=True)
def unpruned(whole, remote):
    whole.model.pruner = remote.model.pruner = build_pruner("none")


def front_of(loaded):
    return FrontEnd(*loaded[:3], "vicuna_v1")


def ask(front, *texts, images=IMAGES[:1], **options):
    """Answers (B, n) to questions about all images each."""
    inputs = inputs_of(front, *texts, images=images)
    return front.model.generate(**inputs, **{**NEW, **options})


def inputs_of(front, *texts, images=IMAGES[:1]):
    pictures = list(map(front.picture, images))
    prompts = [front.encode(front.prompt(text, len(images))) for text in texts]
    return front.inputs(prompts, [pictures] * len(texts), list(texts))


def outside_the_decoder():
    """Methods that need nothing of the decoder, by what they declare."""
    found = []
    for name in METHODS:
        pruner = make_pruner(name, 64)
        try:
            VLLMEngine.check_method(pruner)
        except ValueError:
            continue
        found.append(name)
    return found


def test_the_model_has_no_decoder_layers(remote, whole):
    names = set(remote.model.state_dict())
    assert not any(name.startswith(("model.layers.", "model.norm.", "lm_head.")) for name in names)
    decoder = ("model.layers.", "model.norm.", "lm_head.")
    kept = {name for name in whole.model.state_dict() if not name.startswith(decoder)}
    assert names == kept and remote.model.config.num_hidden_layers > 0
    with pytest.raises(ValueError, match="which `generate` asks"):
        remote.model(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="cannot be saved"):
        remote.model.save_pretrained("nowhere")


def test_there_are_methods_on_both_sides():
    possible = set(outside_the_decoder())
    assert {"none", "random", "vispruner", "divprune", "cdpruner", "prumerge"} <= possible
    assert possible.isdisjoint({"fastv", "nuwa", "pyramiddrop", "glimpseprune"})


@pytest.mark.parametrize("name", outside_the_decoder())
def test_answers_are_those_of_the_whole_model(whole, remote, name):
    texts = ("What is it?", "How many of these are there?")
    for front in (whole, remote):
        front.model.pruner = make_pruner(name, 64)
    with trace_pruning(whole.model) as there:
        expected = ask(whole, *texts, images=IMAGES)
    with trace_pruning(remote.model) as here:
        assert torch.equal(ask(remote, *texts, images=IMAGES), expected)
    assert len(here.visual_positions) == 4
    for own, other in zip(here.visual_positions, there.visual_positions, strict=True):
        assert torch.equal(own, other)
    for field in ("visual_tokens", "prompt_tokens"):
        assert torch.equal(torch.stack(getattr(here, field)), torch.stack(getattr(there, field)))
    assert here.kv_bytes == there.kv_bytes and here.flops == there.flops
    assert torch.equal(here.position_ids, there.position_ids)


def test_prompts_without_images_are_answered(whole, remote):
    assert torch.equal(ask(remote, "Hello", images=[]), ask(whole, "Hello", images=[]))


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "vispruner+fastv"])
def test_methods_inside_the_decoder_are_refused_with_the_reason(remote, name):
    with pytest.raises(ValueError, match="acts inside the decoder, which runs in a server"):
        remote.model.pruner = make_pruner(name)
    assert remote.model.pruner.name == "none"
    with pytest.raises(ValueError, match="acts inside the decoder"):
        load(CHECKPOINT, engine=VLLMEngine("http://127.0.0.1:9"), pruner=make_pruner(name))


def test_positions_with_gaps_are_refused(remote, own_grids_model):
    with pytest.raises(ValueError, match="on 3 axes, which a server is not told"):
        VLLMEngine.check_model(type(own_grids_model))

    class Gaps(type(build_pruner("random"))):
        position_policy = "grid"

    with pytest.raises(ValueError, match="at their places in the unpruned image"):
        remote.model.pruner = Gaps()
    inputs = inputs_of(remote, "What is it?")
    prompt = remote.model.engine.encode(remote.model, **inputs)
    prompt.position_ids = prompt.position_ids * 2
    with pytest.raises(ValueError, match="positions with gaps"):
        remote.model.engine.generate(remote.model, prompt, **NEW)


def test_a_bias_of_attention_is_refused_as_no_server_would_know_of_it(remote):
    prompt = remote.model.engine.encode(remote.model, **inputs_of(remote, "What is it?"))
    prompt.extras[KEY_BIAS] = torch.zeros(prompt.inputs_embeds.shape[:2])
    with pytest.raises(ValueError, match="adds to attention in the decoder"):
        remote.model.engine.generate(remote.model, prompt, **NEW)


def test_a_streamer_is_told_as_by_the_whole_model(whole, remote, capsys):
    for front in (whole, remote):
        streamer = TextStreamer(front.tokenizer, skip_prompt=True)
        ask(front, "What is it?", streamer=streamer)
    first, second, _ = capsys.readouterr().out.split("\n")
    assert first == second and first


@pytest.mark.parametrize("by", ["stop", "criteria"])
def test_an_answer_ends_with_its_stop_text(whole, remote, server, by):
    inputs = inputs_of(remote, "What is it?")
    answer = ask(whole, "What is it?")[0]
    word = whole.tokenizer.decode(answer[2:3])
    rule = KeywordsStoppingCriteria([word], remote.tokenizer, inputs["input_ids"])
    options = {"stop": word} if by == "stop" else {"stopping_criteria": [rule]}
    before = server.ended
    found = ask(remote, "What is it?", **options)[0]
    assert len(found) <= 3 and torch.equal(found, answer[: len(found)])
    assert word in remote.tokenizer.decode(found)
    assert server.requests[-1]["stream"] and server.ended >= before


def test_an_answer_ends_where_the_streamer_gives_up(remote, server):
    class Enough(Exception):
        pass

    class Streamer:
        def put(self, value):
            if value.numel():
                raise Enough

        def end(self):
            raise AssertionError

    server.pause, before = 0.05, server.ended
    try:
        with pytest.raises(Enough):
            ask(remote, "What is it?", streamer=Streamer(), max_new_tokens=1000)
        assert wait_until(lambda: server.ended > before)
    finally:
        server.pause = 0.0


def test_an_answer_that_is_not_wanted_any_more_ends_early(remote, server):
    server.pause, before, made = 0.05, server.ended, server.made
    try:
        inputs = inputs_of(remote, "What is it?")
        prompt = remote.model.engine.encode(remote.model, **inputs)
        found = remote.model.engine.generate(
            remote.model,
            prompt,
            should_stop=lambda: server.made > made + 2,
            do_sample=False,
            max_new_tokens=1000,
        )
        assert 0 < found.shape[1] < 1000
        assert wait_until(lambda: server.ended > before)
    finally:
        server.pause = 0.0


def test_everything_about_the_choice_of_tokens_is_said(remote, server):
    ask(remote, "What is it?", do_sample=True, temperature=0.5, top_p=0.9, top_k=7, seed=11)
    body = server.requests[-1]
    assert (body["temperature"], body["top_p"], body["top_k"], body["seed"]) == (0.5, 0.9, 7, 11)
    assert body["max_tokens"] == 6 and body["ignore_eos"] and body["stop_token_ids"] == [2]
    assert body["repetition_penalty"] == 1.0 and body["min_p"] == 0.0
    ask(remote, "What is it?", do_sample=True)
    body = server.requests[-1]
    assert (body["temperature"], body["top_p"], body["top_k"]) == (1.0, 1.0, 50)
    ask(remote, "What is it?")
    assert server.requests[-1]["temperature"] == 0.0 and "seed" not in server.requests[-1]


def test_none_takes_a_value_of_the_settings_away(remote, server):
    """As in `generate`: the settings of Vicuna have a top_p, and programs say None to it."""
    ends = {"eos_token_id": 2, "pad_token_id": 0}
    config = GenerationConfig(do_sample=True, temperature=0.9, top_p=0.6, top_k=7, **ends)
    own = {"generation_config": config, "do_sample": True}
    ask(remote, "What is it?", **own, temperature=0.2, top_p=None)
    body = server.requests[-1]
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.2, 1.0, 7)
    ask(remote, "What is it?", **own, temperature=None, top_k=None)
    body = server.requests[-1]
    assert (body["temperature"], body["top_p"], body["top_k"]) == (1.0, 0.6, 0)


def test_no_share_of_the_probability_is_the_likeliest_token(whole, remote, server):
    """As in `generate`; vLLM takes only values above 0."""
    found = [ask(one, "What is it?", do_sample=True, top_p=0.0) for one in (whole, remote)]
    assert found[0].tolist() == found[1].tolist()
    body = server.requests[-1]
    assert (body["temperature"], body["top_p"]) == (0.0, 1.0)


def test_prompts_of_a_batch_have_seeds_of_their_own(remote, server):
    before = len(server.requests)
    ask(remote, "What is it?", "And where?", do_sample=True, seed=5)
    assert sorted(body["seed"] for body in server.requests[before:]) == [5, 6]


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"repetition_penalty": 1.2},
        {"output_scores": True},
        {"generation_strategy": "self_speculative"},
        {"stopping_criteria": [len]},
    ],
)
def test_what_a_server_cannot_do_is_refused_with_the_reason(remote, option):
    with pytest.raises(ValueError, match="is not possible with a server"):
        ask(remote, "What is it?", **option)


def test_a_length_of_the_settings_counts_the_start_mark(whole, remote):
    found = []
    for front in (whole, remote):
        config = GenerationConfig(max_length=5, eos_token_id=[], pad_token_id=0)
        found.append(ask(front, "What is it?", max_new_tokens=None, generation_config=config))
    assert found[0].tolist() == found[1].tolist() and found[0].shape == (1, 4)


def test_unknown_keywords_are_refused(remote):
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperatur'"):
        ask(remote, "What is it?", temperatur=1)


def test_attention_is_not_recorded(remote):
    with trace_pruning(remote.model, attention=[0]):
        with pytest.raises(ValueError, match="attention is not recorded"):
            ask(remote, "What is it?")


def test_many_threads_ask_at_once_without_the_model(whole, remote, server):
    texts = [f"What is number {n}?" for n in range(6)]
    expected = [ask(whole, text) for text in texts]
    prompts = [
        remote.model.engine.encode(remote.model, **inputs_of(remote, text)) for text in texts
    ]
    found = [None] * len(prompts)
    server.together, server.most = len(prompts), 0

    def one(number):
        found[number] = remote.model.engine.generate(remote.model, prompts[number], **NEW)

    try:
        threads = [threading.Thread(target=one, args=(n,)) for n in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        server.together = 0
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert server.most == len(prompts)


def test_several_servers_share_the_answers(whole, server):
    with stub_vllm(server.model) as second:
        urls = f"{server.url},{second.url}/v1"
        front = front_of(load(CHECKPOINT, engine=VLLMEngine(urls)))
        for one in (server, second):  # no answer is over before all have begun
            one.together, one.most = 2, 0
        before = len(server.requests), len(second.requests)
        texts = [f"What is number {n}?" for n in range(4)]
        found = ask(front, *texts)
        assert torch.equal(found, ask(whole, *texts))
        assert len(server.requests) - before[0] == len(second.requests) - before[1] == 2
        server.together = 0


def test_prompts_and_answers_end_where_the_server_has_no_positions(server, whole):
    with stub_vllm(server.model, positions=80) as small:
        front = front_of(load(CHECKPOINT, engine=VLLMEngine(small.url)))
        with pytest.raises(PromptTooLong, match="has 80 for it and an answer"):
            ask(front, "What is it?")
        text = "What is it? " * 2
        length = len(front.encode(front.prompt(text)))
        with pytest.warns(UserWarning, match=f"ends after {80 - length}, as"):
            found = ask(front, text, images=[], max_new_tokens=100, eos_token_id=None)
        assert found.shape[1] == 80 - length


def test_a_server_that_dies_in_the_middle_of_an_answer_is_an_error(remote, server):
    server.die_after = 2
    try:
        for streamer in (None, TextStreamer(remote.tokenizer, skip_prompt=True)):
            with pytest.raises(EngineError, match=f"{server.url} went away in the middle of an"):
                ask(remote, "What is it?", streamer=streamer)
    finally:
        server.die_after = None


def test_a_server_that_fails_is_no_fault_of_the_question(remote, server):
    server.broken = True
    try:
        with pytest.raises(EngineError, match="failed with status 500: EngineCore encountered"):
            ask(remote, "What is it?")
    finally:
        server.broken = False


def test_tokens_that_the_model_has_not_are_an_error(remote, server):
    server.meddle = lambda ids: [*ids, 10**6]
    try:
        with pytest.raises(EngineError, match="answers with token 1000000, of which the model"):
            ask(remote, "What is it?")
    finally:
        server.meddle = None
