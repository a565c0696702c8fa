"""What programs load before they can begin: nobody waits for modules that are not used."""

import subprocess
import sys

from tests.paths import GOLDEN, ROOT

SERVING = ("llava.serve.cli", "llava.serve.engine", "llava.serve.model_worker")
PROGRAMS = (*SERVING, "llava.eval.run_llava", "llava.eval.compare", "llava.eval.efficiency")


def loaded(code, *words):
    """Names of all modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print(*sys.modules)"
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_serving_needs_nothing_of_evaluation():
    names = loaded(f"import {', '.join(SERVING)}")
    assert not [name for name in names if name.startswith("llava.eval")]


def test_no_program_loads_the_compiler_of_torch_before_it_compiles():
    model, image = GOLDEN / "tiny-llava-v1.5", GOLDEN / "images/img0_336x336.png"
    words = ["--query", "What is it?", "--max_new_tokens", "2", "--device", "cpu"]
    words += ["--pruning-method", "vispruner", "--visual-token-num", "64"]
    code = f"import {', '.join(PROGRAMS)}\nfrom llava.eval import run_llava; run_llava.main()"
    names = loaded(code, "--model-path", model, "--image-file", image, *words)
    early = {"torch._dynamo", "torch._inductor", "sympy"} & {*names}
    if early:  # torch 2.6 cannot be used by transformers without sympy
        early -= {*loaded("import transformers.models.llama.modeling_llama")}
    assert "torch" in names and not early
