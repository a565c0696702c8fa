"""Upload files of the evaluation servers, gathered for `benchmarks`."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from llava.eval.benchmarks import seed as eval_seed
from llava.eval.benchmarks import uploads
from llava.eval.files.matching import unique
from llava.eval.files.records import read_json, read_jsonl, read_table

VQAV2_TEST = "vqav2/llava_vqav2_mscoco_test2015.jsonl"


@dataclass(frozen=True)
class Upload:
    """A file for a server.

    ending: of its name
    write:  (data folder, question file, answers, path of the upload)
    server: where it goes, and what is known of that server
    folder: in place of `answers` in the path of the answers file
    """

    ending: str
    write: Callable[[str, str, list[dict], str], None]
    server: str
    folder: str = "answers_upload"


def _texts(answers: list[dict]) -> dict:
    return {key: answer["text"] for key, answer in unique(answers).items()}


def vqav2(data_dir, questions, answers, path):
    every = read_jsonl(os.path.join(data_dir, VQAV2_TEST), ("question_id",))
    uploads.write_json(uploads.vqav2(every, _texts(answers)), path)


def vizwiz(data_dir, questions, answers, path):
    asked = read_jsonl(questions, ("question_id", "image"))
    uploads.write_json(uploads.vizwiz(asked, _texts(answers)), path)


def mmbench(data_dir, questions, answers, path):
    uploads.write_xlsx(uploads.mmbench(read_table(questions, ("index",)), answers), path)


def mmvet(data_dir, questions, answers, path):
    uploads.write_json(uploads.mmvet(answers), path, indent=2)


def seed(data_dir, questions, answers, path):
    annotation = read_json(os.path.join(data_dir, "seed_bench", "SEED-Bench.json"))
    texts = eval_seed.texts_by_id(answers)
    uploads.write_jsonl(uploads.seed(annotation["questions"], texts), path)


VQAV2 = Upload(
    ".json", vqav2, "EvalAI, VQA challenge, phase test-dev (https://eval.ai/web/challenges)"
)
VIZWIZ = Upload(
    ".json",
    vizwiz,
    "the VizWiz server on EvalAI, which was reported closed in December 2025: score the "
    "validation split instead (SPLIT=val)",
)
MMBENCH = Upload(".xlsx", mmbench, "https://mmbench.opencompass.org.cn/mmbench-submission")
MMVET = Upload(".json", mmvet, "https://huggingface.co/spaces/whyu/MM-Vet_Evaluator", "results")
SEED = Upload(".jsonl", seed, "https://huggingface.co/spaces/AILab-CVC/SEED-Bench_Leaderboard")
