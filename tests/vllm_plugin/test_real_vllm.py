"""Pruning inside a real vLLM: its answers are ours, token by token (scripts/test_vllm.sh).

vLLM's own LLaVA does not load without torchvision; VLLM_PYTHONPATH names folders of packages that
its environment lacks.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from llava.front_end import FrontEnd
from llava.model.builder import load_pretrained_model
from llava.model.export import export
from llava.playground import default_model_path
from llava.pruning import build_pruner
from tests.paths import GOLDEN, ROOT

pytestmark = pytest.mark.vllm
PICTURES = sorted((ROOT / "playground/benchmark/images").iterdir())[:3]
PICTURES.append(GOLDEN / "images/img1_640x360.png")  # not square: it is padded
QUESTIONS = (
    "What color is the ring?\nAnswer the question using a single word or phrase.",
    "Describe the image.",
)
NUM_NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The playground's model in the layout of transformers."""
    target = tmp_path_factory.mktemp("vllm") / "playground-hf"
    export(default_model_path(), str(target), "llava-hf")
    return target


def vllm_environment(*folders) -> dict[str, str]:
    path = [str(ROOT), *map(str, folders), os.environ.get("VLLM_PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module", autouse=True)
def torchvision():
    command = [os.environ["VLLM_PYTHON"], "-c", "import torchvision"]
    if subprocess.run(command, env=vllm_environment(), capture_output=True).returncode:
        pytest.skip("the environment of vLLM has no torchvision that loads; its LLaVA needs one")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What `pip install --no-deps` leaves of this package beside vLLM: its entry points."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", target]
    subprocess.run(command, cwd=ROOT, check=True)
    return target


@pytest.fixture(scope="module")
def front():
    loaded = load_pretrained_model(
        default_model_path(), None, "llava-v1.5", device="cpu", torch_dtype=torch.float32
    )
    return FrontEnd(*loaded[:3], conv_mode="vicuna_v1")


def asked():
    """(pictures, question): one picture each, and two at once."""
    yield from (([picture], question) for picture in PICTURES for question in QUESTIONS)
    yield PICTURES[:2], QUESTIONS[1]


@pytest.mark.parametrize("method", [None, "vispruner", "visionzip", "divprune"])
def test_answers_are_ours_token_by_token(front, folder, installed, tmp_path, method):
    settings = {} if method is None else {"visual_token_num": 64}
    front.model.pruner = build_pruner(method or "none", **settings)
    image_id = json.loads((folder / "config.json").read_text())["image_token_index"]
    prompts, expected = [], []
    for paths, question in asked():
        ids = front.encode(front.prompt(question, len(paths)))
        pictures = [front.picture(Image.open(path)) for path in paths]
        inputs = front.inputs([ids], [pictures], [question])
        answer = front.model.generate(**inputs, do_sample=False, max_new_tokens=NUM_NEW)
        expected.append(answer[0].tolist())
        row = [image_id if number < 0 else number for number in ids.tolist()]
        prompts.append({"ids": row, "images": [str(path) for path in paths]})
    job = {"model": str(folder), "prompts": prompts, "num_new": NUM_NEW, "overrides": {}}
    if method is not None:
        job["overrides"] = {"pruning": {"method": method, **settings}}
    found = answered(job, installed, tmp_path)
    assert found["answers"] == expected
    each = 64 if method else 576
    lengths = [len(own["ids"]) + len(own["images"]) * (each - 1) for own in prompts]
    assert found["lengths"] == lengths


def test_a_model_that_it_does_not_prune_ends_the_start_with_the_reason(installed, tmp_path):
    export(str(GOLDEN / "tiny-llava-v1.6"), str(tmp_path / "next-hf"), "llava-hf")
    overrides = {"pruning": {"method": "vispruner", "visual_token_num": 64}}
    job = {"model": str(tmp_path / "next-hf"), "prompts": [], "num_new": 1, "overrides": overrides}
    done = run(job, installed, tmp_path)
    said = done.stdout + done.stderr  # its engine is a process of its own
    assert done.returncode and "prunes LLaVA-1.5 alone, and this model is llava_next" in said


def answered(job, installed, tmp_path) -> dict:
    """What vLLM makes of a job."""
    done = run(job, installed, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((tmp_path / "answers.json").read_text())


def run(job, installed, tmp_path) -> subprocess.CompletedProcess:
    """A job given to vLLM in its own environment."""
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = ROOT / "tests/vllm_plugin/answer.py"
    command = [os.environ["VLLM_PYTHON"], script, "job.json", "answers.json"]
    options = {"capture_output": True, "encoding": "utf-8", "timeout": 1800}
    return subprocess.run(command, cwd=tmp_path, env=vllm_environment(installed), **options)
