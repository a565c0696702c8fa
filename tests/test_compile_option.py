"""Programs that are asked to compile where nothing can be compiled say so in one line."""

import importlib
import sys
import threading

import pytest
import torch

from llava.errors import UnavailableError
from llava.model.language_model import compiling
from llava.playground import default_image

IMAGE = ["--image-file", default_image()]
#: program -> what it needs besides --compile
PROGRAMS = {
    "llava.eval.run_llava": [],
    "llava.eval.attention_maps": [*IMAGE, "--query", "Why?", "--output-dir", "maps"],
    "llava.eval.model_vqa": [],
    "llava.eval.model_vqa_loader": [],
    "llava.eval.efficiency.program": ["--config", "playground", "--method", "random"],
    "llava.eval.efficiency.decode_speed": [],
    "llava.eval.efficiency.throughput": [],
    "llava.eval.compare.suite": [],
    "llava.serve.cli": [*IMAGE],
    "llava.serve.model_worker": [],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_missing_compiler_is_said_in_one_line(program, monkeypatch, tmp_path):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    monkeypatch.chdir(tmp_path)
    words = [*PROGRAMS[program], "--compile"]
    monkeypatch.setattr(sys, "argv", [program, *words, "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(program).main()
    assert str(ended.value.code).startswith("error: compile: ")
    assert "install g++ or clang++" in ended.value.code and "\n" not in ended.value.code


def test_every_thread_has_the_settings_that_compiled_code_needs():
    """A server loads a model in one thread and answers in others."""
    from torch._inductor import config, cpu_vec_isa

    found = []

    def answer():
        compiling.compiled(abs)(torch.ones(3))
        limits = torch._dynamo.config
        before_2_7 = not hasattr(limits, "recompile_limit")
        most = limits.cache_size_limit if before_2_7 else limits.recompile_limit
        found.append((most, config.cpp.simdlen))

    try:
        compiling.check_compiler(torch.device("cpu"))
    except UnavailableError as error:
        pytest.skip(str(error))
    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
    width = vectors.bit_width() if (vectors := cpu_vec_isa.pick_vec_isa()) else None
    assert found == [(compiling.MOST_GRAPHS, width)]


def test_what_torch_fails_at_is_said_with_its_reason():
    def step(x):
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(UnavailableError, match=r"could not compile step \(.+\): leave compile out"):
        compiling.compiled(step)(torch.ones(3))


def test_more_graphs_than_torch_keeps_are_an_error_with_its_reason():
    try:
        compiling.check_compiler(torch.device("cpu"))
    except UnavailableError as error:
        pytest.skip(str(error))

    def shifted(x):
        return x + 1

    compiling.prepare()
    limits = torch._dynamo.config
    name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"
    with limits.patch({name: 1}):
        compiling.compiled(shifted)(torch.ones(3))
        with pytest.raises(UnavailableError, match=r"could not compile shifted \(.+\): leave"):
            compiling.compiled(shifted)(torch.ones(3).double())


@pytest.mark.parametrize(
    ("module", "found", "message"),
    [(None, None, "pip install triton"), (object(), None, "install gcc or clang")],
)
def test_what_a_gpu_lacks_is_named(module, found, message, monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: module)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: found)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UnavailableError, match=message):
        compiling.check_compiler(torch.device("cuda"))
