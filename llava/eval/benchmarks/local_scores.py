"""What each benchmark's scorer needs from the data folder, gathered for `benchmarks`.

Every function takes (data folder, question file, answers) and returns `{"score", "count", ...}`.
"""

import os

from llava.eval.benchmarks import gqa as eval_gqa
from llava.eval.benchmarks import mmbench as eval_mmbench
from llava.eval.benchmarks import mme as eval_mme
from llava.eval.benchmarks import pope as eval_pope
from llava.eval.benchmarks import qbench as eval_qbench
from llava.eval.benchmarks import refcoco as eval_refcoco
from llava.eval.benchmarks import seed as eval_seed
from llava.eval.benchmarks import sqa as eval_science_qa
from llava.eval.benchmarks import textvqa as eval_textvqa
from llava.eval.benchmarks import uploads
from llava.eval.benchmarks import vizwiz as eval_vizwiz
from llava.eval.benchmarks import vqav2 as eval_vqav2
from llava.eval.benchmarks.mmbench import mmbench_question
from llava.eval.files.records import complete, read_json, read_json_list, read_jsonl


def pope(data_dir, path, answers):
    folder = os.path.join(data_dir, "pope", "coco")
    questions = complete(read_jsonl(path), eval_pope.FIELDS)
    result = eval_pope.evaluate(folder, questions, answers)
    if result["unlabelled"]:
        raise ValueError(f"{folder} has no labels of {', '.join(result['unlabelled'])}")
    return result


def textvqa(data_dir, path, answers):
    annotations = os.path.join(data_dir, "textvqa", "TextVQA_0.5.1_val.json")
    return eval_textvqa.evaluate(eval_textvqa.read_annotations(annotations), answers)


def gqa(data_dir, path, answers):
    questions = read_json(os.path.join(data_dir, "gqa", "data", "testdev_balanced_questions.json"))
    return eval_gqa.evaluate(eval_gqa.asked(questions, answers), uploads.gqa(answers))


def vqav2(data_dir, path, answers):
    annotations = os.path.join(data_dir, "vqav2", "v2_mscoco_val2014_annotations.json")
    return eval_vqav2.evaluate(eval_vqav2.read_annotations(annotations), answers)


def vizwiz(data_dir, path, answers):
    humans = eval_vizwiz.read_annotations(os.path.join(data_dir, "vizwiz", "val.json"))
    return eval_vizwiz.evaluate(
        humans, complete(read_jsonl(path), ("question_id", "image")), answers
    )


def base_index(line):
    """The question that an answer belongs to, whichever rotation of its options was shown."""
    return mmbench_question({"index": line["question_id"]})


def mmbench(data_dir, path, answers):
    return eval_mmbench.evaluate(eval_mmbench.read_rows(path), answers)


def mme(data_dir, path, answers):
    truth = eval_mme.read_ground_truth(os.path.join(data_dir, "MME"))
    return eval_mme.evaluate(eval_mme.convert(truth, answers))


def seed(data_dir, path, answers):
    annotation = read_json(os.path.join(data_dir, "seed_bench", "SEED-Bench.json"))
    asked, texts = eval_seed.asked(annotation, answers), eval_seed.texts_by_id(answers)
    scores = eval_seed.evaluate({**annotation, "questions": asked}, texts)
    return {"score": scores[eval_seed.TOTAL], "count": len(asked), "scores": scores}


def seed_report(result):
    return eval_seed.report(result["scores"])


def qbench(data_dir, path, answers):
    return eval_qbench.evaluate(complete(read_json_list(path), eval_qbench.FIELDS), answers)


def refcoco(data_dir, path, answers):
    """The boxes of `llava_refcoco_val.jsonl` are in `refcoco_val.jsonl` beside it."""
    folder, name = os.path.split(path)
    annotations = os.path.join(folder, name.removeprefix("llava_"))
    return eval_refcoco.evaluate(eval_refcoco.read_annotations(annotations), answers)


def science_qa(data_dir, path, answers):
    problems, _ = eval_science_qa.read_problems(os.path.join(data_dir, "scienceqa"), "test")
    asked = [answer["question_id"] for answer in answers]
    return eval_science_qa.evaluate(problems, asked, answers)
