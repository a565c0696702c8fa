"""The program of GlimpsePrune+: runs with a local judge that learn, resume, and are used; both
families; one process and two."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.train.train_glimpseprune import train as train_glimpse
from llava.train.train_glimpseprune_plus import prepare, train
from tests.eval.stub_judge import stub_judge
from tests.golden_data import GOLDEN
from tests.paths import ROOT
from tests.ports import free_port
from tests.train.train_tools import write_own_grids_start, write_start

FAMILIES = ("llava", "qwen")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with tiny models of both families, and questions with boxes and rewards."""
    folder = tmp_path_factory.mktemp("plus")
    (folder / "cot/gqa").mkdir(parents=True)
    write_start(folder, "llava", num_hidden_layers=3, initializer_range=0.3)
    write_own_grids_start(folder / "qwen", initializer_range=0.3)
    rows = []
    for path in sorted((GOLDEN / "images").glob("*.png"))[:4]:
        width, height = Image.open(path).size
        shutil.copy(path, folder / "cot/gqa")
        place = {"image": path.name, "width": width, "height": height, "dataset": "gqa"}
        for side, left in (("left", 0), ("right", width / 2)):
            box = [left, 0, left + width / 2, height]
            rows.append({"question": f"What is {side}?", "answer": "a", "bboxs": [box], **place})
    (folder / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = {"json_path": str(folder / "boxes.jsonl"), "mapper": "cot_train"}
    short = "{}\nAnswer the question using a single word or phrase."
    sets = {
        "judged": [{**one, "score_funcs": ["llm"]}],
        "ruled": [{**one, "prompt": short, "score_funcs": ["precision_match"]}],
        "bare": [one],
    }
    sets["both"] = [*sets["judged"], *sets["ruled"]]
    for name, entries in sets.items():
        (folder / f"{name}.yaml").write_text(yaml.dump({"datasets": entries}))
    return folder


def command_line(workplace, output, *flags, family="llava", data="both"):
    words = {
        "--model_name_or_path": workplace / family,
        "--train_dataset": workplace / f"{data}.yaml",
        "--img_dir": workplace,
        "--output_dir": output,
        "--use_cpu": True,
        "--per_device_train_batch_size": 4,
        "--num_generations": 2,
        "--gradient_accumulation_steps": 1,
        "--max_completion_length": 5,
        "--learning_rate": 1e-2,
        "--lr_scheduler_type": "constant",
        "--warmup_ratio": 0,
        "--lora_r": 4,
        "--lora_dropout": 0,
        "--reduce_layer": 1,
        "--logging_steps": 1,
        "--report_to": "none",
        "--disable_tqdm": True,
    }
    return [str(word) for pair in words.items() for word in pair] + [str(flag) for flag in flags]


def letters(number, body):
    """A judge that counts vowels: what it likes does not depend on when it is asked."""
    text = body["messages"][1]["content"].split("model's answer: ")[1]
    return f"score: {min(sum(text.count(v) for v in 'aeiou') / 20, 1)}"


@pytest.fixture
def judge(monkeypatch):
    with stub_judge(letters) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("JUDGE_MODEL", "counter")
        yield server


def adapter(trainer):
    policy = trainer.objective.policy
    return {name: p.detach() for name, p in policy.named_parameters() if "lora_" in name}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "family, token_pass",
    [pytest.param("llava", "released", marks=pytest.mark.slow), ("qwen", "exact")],
)
def test_a_run_learns_what_it_is_rewarded_for(workplace, tmp_path, judge, family, token_pass):
    flags = ["--num_train_epochs", 12, "--num_generations", 8, "--per_device_train_batch_size", 16]
    flags += ["--token_pass", token_pass, "--learning_rate", 1e-2]
    trainer = train(command_line(workplace, tmp_path, *flags, family=family, data="judged"))
    reward = logged(trainer, "reward")
    # Rounding, so the processor, decides what is drawn: four seeds of each gained 1.58 to 3.07.
    assert sum(reward[-4:]) > sum(reward[:4]) + 1, reward
    last = [entry for entry in trainer.state.log_history if "reward" in entry][-1]
    assert {"reward_std", "completion_length", "ended", "kept", "reward_loss"} <= set(last)
    assert last["judge_requests"] == 16 and last["judge_failures"] == 0
    assert judge.requests[1]["model"] == "counter"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_resumes_exactly_and_its_adapter_is_used_and_trained_upon(
    workplace, tmp_path, judge, family
):
    flags = ["--save_steps", 1, "--max_steps", 2, "--lora_dropout", 0.1]
    whole = train(command_line(workplace, tmp_path / "whole", *flags, family=family))
    shutil.copytree(tmp_path / "whole/checkpoint-1", tmp_path / "rest/checkpoint-1")
    rest = train(command_line(workplace, tmp_path / "rest", *flags, family=family))
    assert logged(rest, "reward") == logged(whole, "reward")
    for name, value in adapter(whole).items():
        assert torch.equal(value, adapter(rest)[name]), name

    base, out = str(workplace / family), str(tmp_path / "whole")
    template = {"llava": "vicuna_v1", "qwen": "qwen2_5_vl"}[family]
    assert json.loads((tmp_path / "whole/config.json").read_text())["conv_mode"] == template
    options = dict(device="cpu", torch_dtype=torch.float32)
    _, merged, _, _ = load_pretrained_model(out, base, get_model_name_from_path(base), **options)
    theirs = whole.objective.policy.merge_and_unload().state_dict()
    changed = merged.state_dict()
    plain = load_pretrained_model(base, None, get_model_name_from_path(base), **options)[1]
    moved = 0
    for name, value in plain.state_dict().items():
        if name.startswith("model.layers."):
            torch.testing.assert_close(changed[name], theirs[name], atol=1e-6, rtol=1e-5)
            moved += not torch.equal(changed[name], value)
    assert moved == 3 * 7  # every linear layer of the decoder, and nothing else

    # Stage 2: a glimpse for the model with the adapter merged.
    words = command_line(workplace, tmp_path / "glimpse", family=family, data="bare")
    drop = ("--num_generations", "--max_completion_length", "--lora_r", "--lora_dropout")
    words = [w for n, w in enumerate(words) if w not in drop and words[max(n - 1, 0)] not in drop]
    words += ["--adapter_dir", out, "--max_steps", "1", "--attn_fuse_size", "16"]
    words += ["--visual_cond_size", "32", "--selected_layers", "1"]
    glimpse = train_glimpse(words)
    frozen = glimpse.model.llava.state_dict()
    for name in theirs:
        if name.startswith("model.layers."):
            torch.testing.assert_close(frozen[name], theirs[name], atol=1e-6, rtol=1e-5)
    again = ["--load_new_modules", tmp_path / "glimpse", "--use_ref_masks", False, "--max_steps", 1]
    again = train(command_line(workplace, tmp_path / "again", *again, family=family))
    assert 0 < logged(again, "kept")[0] <= 1


def test_nothing_but_the_adapter_changes(workplace, tmp_path, judge):
    trainer = train(command_line(workplace, tmp_path, "--max_steps", 2))
    fresh = dict(prepare(command_line(workplace, tmp_path / "x")).objective.named_parameters())
    for name, value in trainer.objective.named_parameters():
        assert torch.equal(value, fresh[name]) != ("lora_B" in name or "lora_A" in name), name


def test_checkpointed_gradients_are_the_same(workplace, tmp_path, judge):
    found = []
    for name, flags in (("plain", []), ("less", ["--gradient_checkpointing", True])):
        for token_pass in ("released", "exact"):
            words = ["--max_steps", 1, "--token_pass", token_pass, *flags]
            trainer = train(command_line(workplace, tmp_path / name / token_pass, *words))
            assert trainer.objective.llava.model.gradient_checkpointing == bool(flags)
            found.append(adapter(trainer))
    for one, other in ((0, 2), (1, 3)):
        for name, value in found[one].items():
            torch.testing.assert_close(value, found[other][name], msg=name)


def test_accumulated_steps_are_those_of_a_larger_batch(workplace, tmp_path, judge):
    large = train(command_line(workplace, tmp_path / "large", "--max_steps", 2))
    flags = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    small = train(command_line(workplace, tmp_path / "small", *flags, "--max_steps", 2))
    assert logged(small, "reward") == pytest.approx(logged(large, "reward"), abs=1e-4)
    for name, value in adapter(large).items():
        torch.testing.assert_close(value, adapter(small)[name], atol=2e-4, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("per_process", [1, 2])
def test_two_processes_learn_what_one_learns(workplace, tmp_path, judge, per_process):
    """Groups of two lie within a process, or spread over both."""
    batch, steps = 2 * per_process, 3
    flags = ["--max_steps", steps, "--learning_rate", 1e-3]
    one = ["--per_device_train_batch_size", batch]
    one = train(command_line(workplace, tmp_path / "one", *flags, *one))
    words = command_line(workplace, tmp_path / "two", *flags, "--ddp_backend", "gloo")
    words += ["--per_device_train_batch_size", str(per_process)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(free_port())]
    launcher += ["-m", "llava.train.train_glimpseprune_plus"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    subprocess.run([*launcher, *words], check=True, timeout=1800, cwd=ROOT, env=environment)
    state = json.loads((tmp_path / "two/trainer_state.json").read_text())
    rewards = [entry["reward"] for entry in state["log_history"] if "reward" in entry]
    assert rewards == pytest.approx(logged(one, "reward"), abs=1e-4)
    from peft import load_peft_weights

    for name, value in load_peft_weights(str(tmp_path / "two"), device="cpu").items():
        own = adapter(one)[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(value, own, atol=2e-5, rtol=1e-3)


def test_a_silent_judge_is_told_before_the_model_is_loaded(workplace, tmp_path, monkeypatch):
    words = command_line(workplace, tmp_path, "--judge_url", "http://127.0.0.1:9/v1")
    words += ["--model_name_or_path", str(tmp_path / "no-such-model")]
    monkeypatch.setattr("urllib3.util.retry.time.sleep", lambda _: None)
    with pytest.raises(ValueError, match="no verdict from http://127.0.0.1:9/v1"):
        train(words)


@pytest.mark.parametrize(
    "flags, data, message",
    [
        (["--num_generations", 3], "ruled", "num_generations 3 must divide the 4 answers"),
        (["--num_generations", 1], "ruled", "must be at least 2"),
        (["--loc_weight", 1], "ruled", "loc_weight cannot be set"),
        (["--token_pass", "x"], "ruled", "token_pass 'x' is unknown, choose from released, exact"),
        (["--reduce_layer", 3], "ruled", "reduce_layer 3 must be one of the 3 decoder layers"),
        (["--use_ref_masks", False], "ruled", "give a trained glimpse with --load_new_modules"),
        (["--gen_mask_usage_ratio", 0.5], "ruled", "give a trained glimpse"),
        (["--gen_mask_usage_ratio", 2], "ruled", "must lie between 0 and 1"),
        (["--eval_dataset", "x.jsonl"], "ruled", "eval_dataset cannot be set"),
        (
            ["--token_pass", "exact", "--attn_implementation", "flash_attention_2"],
            "ruled",
            "choose attn_implementation sdpa",
        ),
        ([], "bare", "names no score_funcs: what is an answer rewarded for"),
        (["--max_input_seq_length", 3], "ruled", "max_input_seq_length 3 is exceeded"),
    ],
)
def test_what_cannot_be_trained_is_told(workplace, tmp_path, flags, data, message):
    with pytest.raises(ValueError, match=message):
        train(command_line(workplace, tmp_path, *flags, data=data))
