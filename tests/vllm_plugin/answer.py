"""Answers with vLLM in its own environment, which need not have anything of the tests:

    python answer.py JOB.json ANSWERS.json

JOB.json: {"model": FOLDER, "overrides": {...}, "prompts": [{"ids": [...], "image": FILE}, ...],
"num_new": N}. ANSWERS.json gets {"answers": [[ID, ...], ...], "lengths": [tokens of each prompt]}.
"""

import json
import sys
from pathlib import Path


def main(job: dict) -> dict:
    from PIL import Image
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job["model"],
        hf_overrides=job["overrides"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 2},
        seed=0,
    )
    prompts = [
        {
            "prompt_token_ids": prompt["ids"],
            "multi_modal_data": {"image": [Image.open(path) for path in prompt["images"]]},
        }
        for prompt in job["prompts"]
    ]
    found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=job["num_new"]))
    return {
        "answers": [list(own.outputs[0].token_ids) for own in found],
        "lengths": [len(own.prompt_token_ids) for own in found],
    }


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
