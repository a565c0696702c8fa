"""What the five training programs share: mistakes are named before a model is loaded, and a run
goes on from its own checkpoints alone."""

import json
import os
import shutil
import sys

import pytest
import torch
import yaml
from PIL import Image

from llava.train import (
    train,
    train_glimpseprune,
    train_glimpseprune_plus,
    train_twigvlm,
    train_twigvlm_plus,
)
from llava.train.arguments import ModelArguments, TrainingArguments
from llava.train.run import (
    RUN_FILE,
    FlagParser,
    check_same_run,
    given_flags,
    newest_checkpoint,
)
from tests.train.train_tools import write_own_grids_start

PROGRAMS = {
    "plain": train,
    "twig": train_twigvlm,
    "gated twig": train_twigvlm_plus,
    "glimpse": train_glimpseprune,
    "plus": train_glimpseprune_plus,
}
#: programs that learn from conversations
CONVERSATIONS = ("plain", "twig", "gated twig")
CONVERSATION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, pictures, conversations and questions with boxes."""
    folder = tmp_path_factory.mktemp("programs")
    write_own_grids_start(folder / "model")
    (folder / "cot/gqa").mkdir(parents=True)
    Image.new("RGB", (56, 56), "red").save(folder / "cot/gqa/a.png")
    rows = [{"id": n, "image": "cot/gqa/a.png", "conversations": CONVERSATION} for n in range(4)]
    (folder / "data.json").write_text(json.dumps(rows))
    row = {"question": "What?", "answer": "That", "image": "a.png", "dataset": "gqa"}
    row |= {"width": 56, "height": 56, "bboxs": [[0, 0, 28, 28]]}
    (folder / "boxes.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    for name, rewards in (("ruled", ["precision_match"]), ("odd", ["bleu"])):
        entry = {"json_path": str(folder / "boxes.jsonl"), "score_funcs": rewards}
        (folder / f"{name}.yaml").write_text(yaml.dump({"datasets": [entry]}))
    return folder


def words(place, program, output, **changes):
    flags = {
        "model_name_or_path": place / "model",
        "output_dir": output,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
    }
    if program in CONVERSATIONS:
        flags |= {"data_path": place / "data.json", "image_folder": place}
    else:
        data = {"glimpse": "boxes.jsonl", "plus": "ruled.yaml"}[program]
        flags |= {"train_dataset": place / data, "img_dir": place}
    if program.endswith("twig"):
        flags |= {"twig_K": 1, "twig_T": 1}
    flags |= changes
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learnin_rate", "1"], "no flag --learnin_rate .did you mean '--learning_rate'"),
        (["--learning_rat", "1"], "no flag --learning_rat .did you mean '--learning_rate'"),
        (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["stray"], "no flag stray"),
    ],
)
def test_a_flag_that_is_not_there_is_named_with_the_closest(tmp_path, flags, message):
    parser = FlagParser((ModelArguments, TrainingArguments))
    with pytest.raises(ValueError, match=message):
        parser.parse(["--output_dir", str(tmp_path), *flags])


def test_flags_are_found_in_both_spellings():
    assert given_flags(["--version", "v1", "--max_pixels=9", "-x"]) == {"version", "max_pixels"}


def test_a_flag_that_is_switched_off_by_its_name_is_given():
    assert "mm_use_im_patch_token" in given_flags(["--no_mm_use_im_patch_token"])


#: flags of the Trainer that no program follows -> what it says
REFUSED = {
    "smoothing": ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor 0.1 cannot be set"),
    "no epochs": ({"num_train_epochs": 0, "max_steps": -1}, "--num_train_epochs 0.0 must be"),
    "no batches": ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0 must be"),
    "no checkpoint": ({"resume_from_checkpoint": "gone"}, "--resume_from_checkpoint gone: there"),
    "a log of wandb": ({"report_to": "wandb"}, "--report_to wandb needs the package wandb"),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("mistake", REFUSED)
def test_a_flag_of_the_trainer_that_is_not_followed_is_refused(place, tmp_path, program, mistake):
    changes, message = REFUSED[mistake]
    changes = {"model_name_or_path": "missing/model", **changes}
    with pytest.raises(ValueError, match=message):
        PROGRAMS[program].prepare(words(place, program, tmp_path, **changes))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("mistake", ["evaluation", "data"])
def test_a_program_ends_with_one_line_before_a_model_is_loaded(
    place, tmp_path, monkeypatch, program, mistake
):
    data = "data_path" if program in CONVERSATIONS else "train_dataset"
    changes, message = {
        "evaluation": ({"evaluation_strategy": "steps"}, "--evaluation_strategy steps needs data"),
        "data": ({data: "none.json"}, "none.json"),
    }[mistake]
    flags = words(place, program, tmp_path, model_name_or_path="missing/model", **changes)
    monkeypatch.setattr(sys, "argv", ["program", *flags])
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        PROGRAMS[program].train()


@pytest.mark.parametrize(
    ("program", "changes", "message"),
    [
        ("plain", {"lora_enable": True, "tune_mm_mlp_adapter": True}, "leave one out"),
        ("plain", {"lora_enable": True, "lora_bias": "some"}, "choose from none, all, lora_only"),
        ("plain", {"pruning_method": "nothing"}, "unknown pruning method"),
        ("gated twig", {"stage": 3}, "--stage 3 is unknown: 1 distils, 2 reinforces"),
        ("gated twig", {"num_groups": 3}, "--num_groups belongs to --stage 2, this is 1"),
        ("plain", {"group_by_length": True, "group_by_modality_length": True}, "leave one out"),
        ("glimpse", {"mm_projector_lr": 1}, "mm_projector_lr cannot be set"),
        ("glimpse", {"group_by_length": True}, "group_by_length cannot be set"),
        ("plus", {"neftune_noise_alpha": 5}, "neftune_noise_alpha cannot be set"),
        ("twig", {"neftune_noise_alpha": 5}, "neftune_noise_alpha cannot be set"),
        ("glimpse", {"box_frame": "whole"}, "choose from seen, released"),
        ("plus", {"freeze_mm_mlp_adapter": True}, "freeze_mm_mlp_adapter cannot be set"),
        ("plus", {"box_frame": "whole"}, "choose from seen, released"),
        ("plus", {"adapter_dir": "adapter"}, "adapter_dir cannot be set"),
        ("plus", {"lora_r": 0}, "lora_r 0 must be positive"),
        ("plus", {"judge_workers": 0}, "judge_workers 0 must be positive"),
        ("plus", {"train_dataset": "odd.yaml"}, r"odd.yaml: score_funcs bleu are unknown"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused_before_a_model_is_loaded(
    place, tmp_path, monkeypatch, program, changes, message
):
    monkeypatch.chdir(place)
    changes = {"model_name_or_path": "missing/model", **changes}
    with pytest.raises(ValueError, match=message):
        PROGRAMS[program].prepare(words(place, program, tmp_path, **changes))


def test_bounds_that_leave_no_size_for_an_image_are_refused(place, tmp_path):
    with pytest.raises(ValueError, match="max_pixels 10 leave no size"):
        train_glimpseprune.prepare(words(place, "glimpse", tmp_path, max_pixels=10))


@pytest.fixture(scope="module")
def stopped(place, tmp_path_factory):
    """The output folders of runs of two programs that were stopped behind their first step."""
    folder = tmp_path_factory.mktemp("stopped")
    for program in ("plain", "twig"):
        PROGRAMS[program].train(words(place, program, folder / program, save_steps=1))
    return folder


@pytest.mark.parametrize(
    ("before", "program", "changes", "message"),
    [
        ("plain", "plain", {"lora_enable": True}, r"lora_A\S* not trained, here \[64, 64\]"),
        ("plain", "plain", {"data_path": "fewer.json"}, "samples: 4, here 3"),
        ("plain", "twig", {}, "trains: LLaVATrainer, here TwigTrainer"),
        ("plain", "glimpse", {}, "trains: LLaVATrainer, here GlimpseTrainer"),
        ("twig", "twig", {"twig_K": 0}, "twig_K: 1, here 0"),
        ("twig", "gated twig", {}, "trains: TwigTrainer, here DistillationTrainer"),
        ("twig", "plus", {"lora_r": 2}, "trains: TwigTrainer, here PolicyTrainer"),
        ("plain", "plain", {"per_device_train_batch_size": 2}, "train_batch_size: 4, here 2"),
        ("plain", "plain", {"gradient_accumulation_steps": 2}, "accumulation_steps: 1, here 2"),
        ("twig", "twig", {"seed": 1}, "seed: 42, here 1"),
        ("plain", "plain", {"group_by_length": True}, "group_by_length: False, here True"),
    ],
)
def test_a_run_does_not_go_on_from_the_checkpoint_of_another(
    place, stopped, monkeypatch, before, program, changes, message
):
    monkeypatch.chdir(place)
    (place / "fewer.json").write_text(json.dumps(json.loads((place / "data.json").read_text())[:3]))
    with pytest.raises(ValueError, match=f"checkpoint-1 is of another run .*{message}"):
        PROGRAMS[program].train(words(place, program, stopped / before, max_steps=2, **changes))


@pytest.mark.skipif(os.name != "posix", reason="rights are of POSIX")
@pytest.mark.parametrize("program", ["plain", "twig"])
def test_whoever_can_read_a_result_can_read_its_weights(stopped, program):
    for folder in (stopped / program, stopped / program / "checkpoint-1"):
        config, weights = (
            (folder / name).stat().st_mode for name in ("config.json", "model.safetensors")
        )
        assert weights == config


@pytest.mark.parametrize("program", ["plain", "twig"])
def test_a_run_whose_last_checkpoint_is_its_end_takes_no_further_step(
    place, stopped, tmp_path, program
):
    # The run stops amid an epoch of two steps, and is then started again with the same command.
    flags = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 1}
    ended = PROGRAMS[program].train(words(place, program, tmp_path / "run", **flags))
    shutil.copytree(tmp_path / "run/checkpoint-1", tmp_path / "again/checkpoint-1")
    again = PROGRAMS[program].train(words(place, program, tmp_path / "again", **flags))
    assert again.state.global_step == 1
    assert not any("train_loss" in entry for entry in again.state.log_history)
    expected = dict(ended.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in again.model.named_parameters())
    files = (tmp_path / name / "model.safetensors" for name in ("run", "again"))
    assert len({file.read_bytes() for file in files}) == 1


def test_the_log_of_a_resumed_run_is_about_its_own_steps(place, stopped, tmp_path):
    shutil.copytree(stopped / "twig", output := tmp_path / "run")
    flags = {"max_steps": 2, "logging_steps": 1}  # before, every 500
    *_, step, end = train_twigvlm.train(words(place, "twig", output, **flags)).state.log_history
    assert end["train_loss"] == pytest.approx(step["loss"], abs=1e-4)
    rate = end["train_runtime"] * end["train_steps_per_second"]
    assert rate == pytest.approx(1, abs=0.1), "one of two steps was taken by this run"
    assert end["train_samples_per_second"] == pytest.approx(
        4 * end["train_steps_per_second"], abs=0.1
    )


def test_the_rate_of_a_run_counts_the_samples_that_it_takes(place, tmp_path):
    # Of four samples one fills no step of three.
    flags = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    flags |= {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "no"}
    end = train_twigvlm.train(words(place, "twig", tmp_path, **flags)).state.log_history[-1]
    assert end["step"] == 2
    taken = end["train_samples_per_second"] / end["train_steps_per_second"]
    assert taken == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize(
    "lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_checkpoint_that_lost_a_file_is_not_continued_from(place, stopped, tmp_path, lost):
    output = tmp_path / "run"
    shutil.copytree(stopped / "twig", output)
    (output / "checkpoint-1" / lost).unlink()
    with pytest.raises(ValueError, match=f"it lacks {lost.replace('e.pth', 'e.*pth')}"):
        train_twigvlm.train(words(place, "twig", output, max_steps=2))


def test_a_checkpoint_of_weights_alone_is_not_continued_from(place, tmp_path):
    # The optimizer and the schedule would begin anew amid the run.
    flags = {"save_only_model": True, "save_steps": 1}
    train_twigvlm.train(words(place, "twig", tmp_path, **flags))
    with pytest.raises(ValueError, match="lacks optimizer.pt .--save_only_model leaves out"):
        train_twigvlm.train(words(place, "twig", tmp_path, max_steps=2, **flags))


def test_a_run_goes_on_from_a_checkpoint_that_does_not_say_whose_it_is(place, stopped, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(stopped / "twig", output)
    (output / "checkpoint-1" / RUN_FILE).unlink()
    assert train_twigvlm.train(words(place, "twig", output, max_steps=2)).state.global_step == 2


def test_a_folder_that_only_looks_like_a_checkpoint_is_none(place, stopped, tmp_path):
    shutil.copytree(stopped / "twig/checkpoint-1", tmp_path / "checkpoint-old")
    trainer = train_twigvlm.train(words(place, "twig", tmp_path, save_strategy="no"))
    assert trainer.state.global_step == 1 and trainer.state.log_history[-1]["train_loss"] > 0


def test_a_run_goes_on_from_a_checkpoint_that_does_not_say_its_order(place, stopped, tmp_path):
    shutil.copytree(stopped / "twig", output := tmp_path / "run")
    facts = json.loads((file := output / "checkpoint-1" / RUN_FILE).read_text())
    assert facts.pop("seed") == 42
    file.write_text(json.dumps(facts))
    assert train_twigvlm.train(words(place, "twig", output, max_steps=2)).state.global_step == 2


def test_a_run_goes_on_from_the_checkpoint_that_is_named_unless_it_has_a_newer(
    place, stopped, tmp_path
):
    flags = {"resume_from_checkpoint": stopped / "twig/checkpoint-1", "max_steps": 2}
    run = words(place, "twig", tmp_path, save_steps=1, **flags)
    assert train_twigvlm.train(run).state.global_step == 2
    assert not (tmp_path / "checkpoint-1").exists()
    with pytest.raises(ValueError, match="checkpoint-1 is of step 1, but .* holds .*checkpoint-2"):
        train_twigvlm.train(run)


def test_a_finished_model_is_not_overwritten_unless_that_is_said(place, tmp_path):
    run = words(place, "plain", tmp_path, save_strategy="no")
    train.train(run)
    with pytest.raises(ValueError, match="holds what another run has trained, and no checkpoint"):
        train.train(run)
    train.train([*run, "--overwrite_output_dir", "True"])


def test_checkpoints_are_not_overwritten(place, stopped):
    flags = words(place, "plain", stopped / "plain", overwrite_output_dir=True)
    with pytest.raises(ValueError, match="the newest checkpoint, which is .*checkpoint-1"):
        train.train(flags)


def test_facts_of_a_run_are_compared_as_they_are_stored(tmp_path):
    (tmp_path / RUN_FILE).write_text(json.dumps({"layers": [1, 2], "trained": {"a": [3]}}))
    check_same_run(str(tmp_path), {"layers": (1, 2), "trained": {"a": (3,)}})
    with pytest.raises(ValueError, match=r"\(b: not trained, here \[4\]\)"):
        check_same_run(str(tmp_path), {"layers": (1, 2), "trained": {"a": (3,), "b": (4,)}})
    with pytest.raises(ValueError, match=r"\(a: \[3\], here not trained\)"):
        check_same_run(str(tmp_path), {"layers": (1, 2), "trained": {}})


def test_a_process_that_comes_before_the_output_folder_begins_anew(tmp_path):
    assert newest_checkpoint(str(tmp_path / "out")) is None
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
