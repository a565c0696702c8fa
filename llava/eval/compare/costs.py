"""What each run of a comparison costs on real prompts: tokens, operations, cache bytes, time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from statistics import mean, median

import torch

from llava.eval.answering.loop import AnswerLoop
from llava.eval.answering.questions import subset
from llava.eval.benchmarks.benchmark import Benchmark
from llava.eval.compare.scores import Run
from llava.eval.efficiency.measure import Workload, llava_facts, time_llava
from llava.eval.files.records import Records
from llava.progress import progress
from llava.pruning import Pruner


@dataclass
class Cost:
    """Averages over the prompts, one prompt at a time.

    tokens_in, tokens_mean: visual tokens that enter the decoder, and on average over its layers
    kv_bytes: of the cache after the prefill, measured on its tensors
    flops:    of the decoder's prefill (`llava.pruning.cost`, "exact")
    seconds:  median time from pixels and token ids to the logits of the first token
    """

    tokens_in: float
    tokens_mean: float
    kv_bytes: float
    flops: float
    seconds: float


def sample_prompts(
    loop: AnswerLoop,
    benchmarks: dict[Benchmark, Records],
    data_dir: str,
    count: int,
    limit: int | None = None,
) -> list[Workload]:
    """`count` prompts, taken from the benchmarks in turns; each is asked for its first token.

    limit: of the questions that were asked; prompts are among those

    Where the loop passes over questions that fail (`skip_bad`), so does this. Raises ValueError
    when no question has an image.
    """
    per_task, skip_bad = -(-count // len(benchmarks)), getattr(loop, "skip_bad", False)
    chosen = []
    for benchmark, asked in benchmarks.items():
        answered = Records(asked.path, subset(asked, limit, benchmark.together))
        questions = benchmark.select(answered, 4 * per_task, skip_bad)
        folder = benchmark.image_folder(data_dir)
        able = (
            q for q in questions if q.images and (not skip_bad or _can_be_asked(loop, q, folder))
        )
        chosen.append([(question, folder) for question in islice(able, per_task)])
    turns = [pair for number in range(per_task) for own in chosen for pair in own[number:][:1]]
    if not turns:
        raise ValueError("there is no question with an image to measure costs on")
    return [_workload(loop, question, folder) for question, folder in turns[:count]]


def _can_be_asked(loop: AnswerLoop, question, folder: str) -> bool:
    try:
        _workload(loop, question, folder)
    except ValueError:
        return False
    return True


def _workload(loop: AnswerLoop, question, folder: str) -> Workload:
    inputs = loop.inputs(question, folder)
    return Workload(inputs["input_ids"], inputs["images"], inputs["image_sizes"], num_tokens=1)


@torch.inference_mode()
def measure_costs(model, runs: list[Run], prompts: list[Workload]) -> dict[tuple, Cost]:
    """Costs by (method, budget) of every run that can run.

    Prompt by prompt, all runs in turns, so that a busy machine slows them alike; the first prompt
    is measured twice and counts once.
    """
    runs = [run for run in runs if run.refused is None]
    facts: dict[tuple, list[dict]] = {}
    seconds: dict[tuple, list[float]] = {}
    measured = progress([prompts[0], *prompts], "costs", "prompts")
    for number, prompt in enumerate(measured):
        for run in runs:
            key = run.method, run.budget
            if number:
                facts.setdefault(key, []).append(llava_facts(model, run.pruner, prompt)["facts"])
            spent = time_llava(model, run.pruner, prompt)["first_token"]
            if number:
                seconds.setdefault(key, []).append(spent)
    model.pruner = Pruner()
    return {
        key: Cost(
            *(mean(fact[name] for fact in own) for name in FACTS),
            seconds=median(seconds[key]),
        )
        for key, own in facts.items()
    }


FACTS = ("visual_tokens_first_layer", "visual_tokens_mean", "kv_bytes", "flops_exact")
