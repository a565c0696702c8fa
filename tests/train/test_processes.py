"""Every recipe under DeepSpeed: two processes of the CPU learn what one learns."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from llava.model import LlavaLlamaForCausalLM
from llava.pruning.twigvlm import grow_twig, save_twig
from llava.pruning.twigvlm_plus import GatedTwig
from tests.golden_data import GOLDEN
from tests.paths import ROOT
from tests.ports import free_port
from tests.train import test_train_glimpseprune as glimpse_tests
from tests.train import test_train_qwen2_5_vl as qwen_tests
from tests.train.recipes import run_recipe
from tests.train.test_run import SAMPLES, workplace  # noqa: F401
from tests.train.train_tools import write_start

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs DeepSpeed: pip install -e .[deepspeed]",
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
# What a CPU needs, two steps, and updates that do not hide an error as AdamW's do.
FLAGS = {
    "use_cpu": True,
    "ddp_backend": "gloo",
    "tf32": False,
    "bf16": False,
    "optim": "sgd",
    "learning_rate": 1e-2,
    "max_steps": 2,
    "model_max_length": 512,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "save_strategy": "no",
    "disable_tqdm": True,
}


RECIPES = ["pretrain", "finetune", "finetune_lora", "train_twig", "train_glimpse"]
RECIPES += ["../qwen2_5_vl/finetune", "../qwen2_5_vl/finetune_lora"]
RECIPES += ["train/train_twig++_stage1", "train/train_twig++_stage2"]


class Farm:
    """A program that starts groups of processes, see `tests.train.rank_farm`."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.rank_farm"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, program, words, ranks=2):
        request = {"program": program, "words": [str(word) for word in words], "ranks": ranks}
        request |= {"port": free_port(), "timeout": 1800}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert answer["ok"], answer["why"]


@pytest.fixture(scope="module")
def farm():
    made = Farm()
    yield made
    made.process.stdin.close()
    made.process.wait(timeout=60)


@pytest.fixture(scope="module")
def place(workplace, tmp_path_factory):  # noqa: F811
    """`workplace` with captions, a projector, data whose texts come last, and boxes. Eight samples
    are two steps, in two processes and in one."""
    pictures = [sample for sample in SAMPLES if "image" in sample]
    texts = [sample for sample in SAMPLES if "image" not in sample]
    captions = [
        {"image": pictures[i % len(pictures)]["image"], "conversations": caption(i)}
        for i in range(8)
    ]
    (workplace / "captions.json").write_text(json.dumps(captions))
    ordered = [pictures[i % len(pictures)] for i in range(6)] + [texts[0]] * 6
    (workplace / "whole.json").write_text(json.dumps([*SAMPLES, *SAMPLES]))
    (workplace / "ordered.json").write_text(json.dumps(ordered))
    projector = {
        name: value
        for name, value in load_file(workplace / "start/model.safetensors").items()
        if "mm_projector" in name
    }
    torch.save(projector, workplace / "mm_projector.bin")
    glimpse_tests.make_workplace(workplace / "boxes")
    model = LlavaLlamaForCausalLM.from_pretrained(workplace / "start")
    twig = grow_twig(model, 1, 1, GatedTwig).state_dict()
    save_twig(str(workplace / "twig"), twig, 1, "start", "twigvlm_plus")
    (workplace / "pictures").mkdir()
    qwen_tests.make_place(workplace / "pictures")
    own = [*qwen_tests.SAMPLES, *qwen_tests.SAMPLES[:2]]
    (workplace / "pictures/whole.json").write_text(json.dumps(own))
    return workplace


def caption(i):
    texts = ("<image>\nDescribe it.", f"Picture number {i} of a cat.")
    return [{"from": who, "value": text} for who, text in zip(("human", "gpt"), texts, strict=True)]


def recipe(name, place, output, **changes):
    """(program, flags) of scripts/v1_5/NAME.sh, or of the folder that the name begins with, on the
    data of `place`."""
    twig, glimpse = "train_twig" in name, name == "train_glimpse"
    pictures = name == "pretrain" or name.endswith("stage2")  # nothing but samples with one
    environment = {
        "LAUNCHER": r"printf %s\n",
        "MODEL": place / ("boxes/llava" if glimpse else "start"),
        "VISION_TOWER": place / "tower",
        "PROJECTOR": place / "mm_projector.bin",
        "DATA": place / ("captions.json" if pictures else "whole.json"),
        "IMAGES": GOLDEN / "images",
        "OUTPUT": output,
        "REPORT_TO": "none",
        "BF16": "False",
        **({"twig_K": 1, "twig_T": 1, "TWIG": place / "twig"} if twig else {}),
    }
    if name.endswith("stage2"):
        changes = {"num_groups": 4} | changes
    if glimpse:
        environment |= {"DATA": place / "boxes/boxes.jsonl", "IMAGES": place / "boxes"}
        changes = {"attn_fuse_size": 16, "visual_cond_size": 32, "le_dropout_prob": 0} | changes
    if name.startswith("../qwen2_5_vl"):
        environment |= {"MODEL": qwen_tests.CHECKPOINT, "IMAGES": place / "pictures"}
        environment["DATA"] = place / "pictures/whole.json"
    if name.endswith("finetune_lora"):
        changes = {"lora_dropout": 0} | changes
    flags = [str(w) for k, v in (FLAGS | changes).items() for w in (f"--{k}", v)]
    done = run_recipe(f"v1_5/{name}.sh", *flags, **environment)
    assert done.returncode == 0, done.stderr
    program, *words = done.stdout.splitlines()
    program = program.removesuffix(".py").replace("/", ".")
    return program, words


def weights(folder):
    """Everything that a training wrote."""
    found = {}
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        if path.name != "training_args.bin":
            read = load_file if path.suffix == ".safetensors" else torch.load
            found |= read(path)
    return found


def assert_same(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=1e-3, msg=name)


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def of_one_process(farm, name, place, output, **changes):
    """What the recipe writes without DeepSpeed: two batches in turn, not at the same time."""
    changes = {"deepspeed": "", "gradient_accumulation_steps": 2, **changes}
    farm.run(*recipe(name, place, output, **changes), ranks=1)
    return weights(output)


@pytest.fixture(scope="module")
def single(farm, place, tmp_path_factory):
    """name -> what the recipe writes in one process, made once."""
    known = {}

    def result(name):
        if name not in known:
            output = tmp_path_factory.mktemp(name.rpartition("/")[2])
            known[name] = of_one_process(farm, name, place, output)
        return known[name]

    return result


@needs_deepspeed
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns_under_deepspeed_what_one_process_learns(
    farm, place, single, tmp_path, name, zero
):
    program, words = recipe(name, place, tmp_path, deepspeed=f"scripts/{zero}.json")
    farm.run(program, words)
    assert_same(weights(tmp_path), single(name))


@needs_deepspeed
@pytest.mark.parametrize("zero", ["zero2", "zero3", "zero3_offload"])
def test_a_recipe_runs_in_its_own_precision(farm, place, tmp_path, zero):
    settings = json.loads((ROOT / f"scripts/{zero}.json").read_text())
    if zero == "zero3_offload":  # DeepSpeed's own AdamW would have to be compiled
        settings["optimizer"]["params"]["torch_adam"] = True
        settings["zero_force_ds_cpu_optimizer"] = False
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    changes = {"deepspeed": tmp_path / "zero.json", "bf16": True, "optim": "adamw_torch"}
    changes |= {"max_steps": 4}  # DeepSpeed's warm-up begins with two steps at a rate of 0
    program, words = recipe("finetune", place, tmp_path / "out", **changes)
    farm.run(program, words)
    start = load_file(place / "start/model.safetensors")
    found = weights(tmp_path / "out")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert found.keys() == start.keys()
    changed = {n for n in found if not torch.equal(found[n], start[n].bfloat16())}
    assert {"lm_head.weight", "model.mm_projector.0.weight"} <= changed


@pytest.fixture(scope="module")
def leftovers(farm, place, tmp_path_factory):
    """(flags, what one process learns with them): the last batch is made of leftovers, two pictures
    for one process and two texts for the other."""
    folder = tmp_path_factory.mktemp("leftovers")
    write_start(
        folder, "next", num_hidden_layers=2, image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=[[84, 168], [168, 84]],
    )  # fmt: skip
    changes = {
        "model_name_or_path": folder / "next",
        "vision_tower": folder / "tower",
        "data_path": place / "ordered.json",
        "image_aspect_ratio": "anyres",
        "max_steps": 3,
    }
    return changes, of_one_process(farm, "finetune", place, folder / "one", **changes)


@pytest.mark.parametrize(
    "zero",
    ["", *(pytest.param(zero, marks=needs_deepspeed) for zero in ("zero2", "zero3"))],
    ids=["ddp", "zero2", "zero3"],
)
def test_a_process_without_images_keeps_no_other_waiting(farm, place, leftovers, tmp_path, zero):
    changes, wanted = leftovers
    changes = {**changes, "deepspeed": zero and f"scripts/{zero}.json"}
    farm.run(*recipe("finetune", place, tmp_path, **changes))
    assert "model.image_newline" in wanted
    assert_same(weights(tmp_path), wanted)


@needs_deepspeed
@pytest.mark.parametrize(
    ("name", "zero"), [("pretrain", "zero2"), ("finetune_lora", "zero3"), ("finetune", "zero3")]
)
def test_a_run_under_deepspeed_resumes(farm, place, tmp_path, name, zero):
    changes = {"deepspeed": f"scripts/{zero}.json", "save_strategy": "steps", "save_steps": 1}
    changes |= {"optim": "adamw_torch", "lr_scheduler_type": "constant", "save_total_limit": 3}
    farm.run(*recipe(name, place, tmp_path / "whole", **changes))
    shutil.copytree(tmp_path / "whole/checkpoint-1", tmp_path / "rest/checkpoint-1")
    farm.run(*recipe(name, place, tmp_path / "rest", **changes))
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")
    assert_same(weights(tmp_path / "rest"), weights(tmp_path / "whole"))


def test_two_processes_resume_in_a_later_epoch(farm, place, tmp_path):
    # Six samples: an epoch is one step, others are left out in each.
    changes = {"deepspeed": "", "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    changes |= {"optim": "adamw_torch"}  # whose checkpoints hold tensors
    changes |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3}
    changes |= {"data_path": place / "data.json", "lr_scheduler_type": "constant"}
    farm.run(*recipe("finetune", place, tmp_path / "whole", **changes))
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "rest/checkpoint-2")
    farm.run(*recipe("finetune", place, tmp_path / "rest", **changes))
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")
    assert len(set(losses(tmp_path / "whole"))) == 3
    assert_same(weights(tmp_path / "rest"), weights(tmp_path / "whole"), tolerance=0)
