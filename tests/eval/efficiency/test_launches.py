"""Counts of what a device is asked to run, and how near decoding comes to its memory."""

import json
from types import SimpleNamespace

import pytest
import torch

from llava import blocks
from llava.eval.efficiency import bandwidth, launches
from llava.eval.efficiency import profile as profiling
from llava.eval.efficiency import program as efficiency
from llava.eval.efficiency.measure import Workload, make_pruner
from llava.pruning import Pruner, captured
from llava.pruning.testing.tiny import make_own_grids_model
from tests.conftest import TINY
from tests.paths import GOLDEN

LAYERS = TINY["num_hidden_layers"]


def counted(call) -> int:
    with launches.Launches() as mode:
        call()
    return mode.count


def test_what_computes_is_counted_and_views_are_not():
    x = torch.randn(4, 4)
    assert counted(lambda: x.t()[:, 1:].unsqueeze(0).expand(2, -1, -1)) == 0
    assert counted(lambda: (x + 1).argmax(dim=1).cumsum(0)) == 3


def counts_of(model, name="none", tokens=4, image_size=None):
    pruner = Pruner() if name == "none" else make_pruner(name, 9, model)
    workload = Workload.random(model, 1, 8, tokens, image_size)
    found = launches.count_launches(model, name, pruner, workload)
    model.pruner = Pruner()
    return found


def test_every_further_token_counts_alike_and_more_layers_count_more(make_model):
    model, deeper = make_model(), make_model(num_hidden_layers=LAYERS + 2)
    few, many = counts_of(model, tokens=6), counts_of(model, tokens=9)
    assert (few.per_token, few.decode) == (many.per_token, many.decode)
    assert few.per_token > few.decode > LAYERS  # choosing a token is work as well
    assert few.select == 0 and few.first_token > few.vision + few.prefill
    more = counts_of(deeper, tokens=6)
    assert (more.decode - few.decode) / 2 == pytest.approx(few.per_layer, abs=few.per_layer / 4)


def test_what_a_cpu_does_in_its_own_way_does_not_count(make_model, monkeypatch):
    model = make_model()
    usual = counts_of(model)
    monkeypatch.setattr(blocks, "PIECE", 4)  # on a CPU many pieces
    assert counts_of(model) == usual


def test_loops_that_a_gpu_has_captured_are_counted_as_they_are(make_model, monkeypatch):
    """Another method, or the calls before, may have captured one by then."""
    model, kept = make_model(), captured.Captures()
    wanted = counts_of(model, "divprune")
    monkeypatch.setattr(captured, "CAPTURES", kept)
    monkeypatch.setattr(captured, "can_capture", lambda tensors: True)
    monkeypatch.setattr(kept, "run", lambda function, args: function(*args) + 0)  # more than it is
    assert counts_of(model, "divprune") == wanted and captured.SETTINGS.enabled


def test_the_work_of_a_method_counts_as_its_own(make_model):
    model = make_model()
    dense, own = counts_of(model), counts_of(model, "cdpruner")
    assert own.select > 0 and (own.prefill, own.decode) == (dense.prefill, dense.decode)
    lines = launches.table([dense, own]).splitlines()
    assert lines[2].startswith("| none |") and lines[3].startswith("| `cdpruner` |")
    assert f"{own.first_token - dense.first_token:+d}" in lines[3]


def test_the_other_family_is_counted_too():
    found = counts_of(make_own_grids_model(), "fastv", image_size=(40, 36))
    assert found.vision > 0 and found.select > 0 and found.per_layer > 1


def test_the_program_counts_in_place_of_measuring(capsys, tmp_path):
    argv = f"--config {GOLDEN / 'tiny-llava-v1.6'} --method fastv --visual-token-num 640"
    argv += f" --layers 4 --dtype fp32 --count-kernels --markdown {tmp_path / 'page.md'}"
    result = efficiency.main([*argv.split(), "--json", str(tmp_path / "r.json")])
    assert [row["name"] for row in result["launches"]] == ["dense", "fastv"]
    assert result["runs"] == [] and "profile" not in result
    page = (tmp_path / "page.md").read_text()
    assert "<!-- launches: begin -->" in page and "| `fastv` |" in page and "4 decoder" in page
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


def test_eager_code_is_counted_and_compiled_code_profiled(monkeypatch):
    """What counts operations is nothing that torch compiles under."""
    model = SimpleNamespace(device=torch.device("cuda"), compile_decoding=None)
    counted, profiled = [], []

    def count_all(model, pruners, workload):
        counted.append(model.compile_decoding)
        return [launches.LaunchCounts("dense", *[1] * 7)]

    monkeypatch.setattr(efficiency, "build_random_model", lambda *sizes, **placed: model)
    monkeypatch.setattr(efficiency, "methods_to_measure", lambda *words: ({}, {}))
    monkeypatch.setattr(efficiency, "describe", lambda *words: {})
    monkeypatch.setattr(Workload, "random", lambda *words: None)
    monkeypatch.setattr(launches, "count_all", count_all)
    monkeypatch.setattr(
        efficiency, "profile_tokens", lambda model, _: profiled.append(model.compile_decoding) or {}
    )
    argv = ["--config", "small", "--device", "cpu", "--count-kernels"]
    result = efficiency.main([*argv, "--compile"])
    assert (counted, profiled) == ([False], [False, True])
    assert list(result["profile"]) == ["plain", "compiled"]
    model.device = torch.device("cpu")
    with pytest.raises(SystemExit, match="this is cpu: leave it out"):
        efficiency.main([*argv, "--compile"])


def test_options_of_times_are_not_dropped_where_nothing_is_timed(capsys):
    for words, said in (
        (["--stock"], "--count-kernels has no use for --stock"),
        (["--time-limit", "9"], "--count-kernels has no use for --time-limit"),
        (["--batch-size", "1,4"], "--count-kernels counts for one --batch-size"),
    ):
        with pytest.raises(SystemExit):
            efficiency.parse_args(["--count-kernels", *words])
        assert said in capsys.readouterr().err


def test_a_token_reads_the_decoder_and_the_head_and_not_the_rest(make_model):
    model = make_model()
    d, inner, vocabulary = (TINY[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
    numbers = LAYERS * (4 * d * d + 3 * d * inner + 2 * d) + d + d * vocabulary
    assert bandwidth.weight_bytes(model) == 4 * numbers
    row = {"ms": {"decode": {"median": 2.0}}, "weight_bytes": 3e6, "kv_bytes": 1e6}
    assert bandwidth.decode_gigabytes_per_second(row) == pytest.approx(2.0)
    assert bandwidth.bandwidth_share(row, {"copy_bandwidth": 8e9}) == pytest.approx(0.25)
    assert bandwidth.bandwidth_share(row, {"copy_bandwidth": None}) is None
    assert bandwidth.decode_gigabytes_per_second({"ms": {"prefill": {}}}) is None


def test_a_copy_has_a_bandwidth(monkeypatch):
    monkeypatch.setitem(bandwidth.COPIED, "cpu", 2**22)
    assert 1e7 < bandwidth.copy_bandwidth(torch.device("cpu")) < 1e13
    assert bandwidth.copy_bandwidth(torch.device("meta")) is None


def event(cat, name, dur=1):
    return {"cat": cat, "name": name, "dur": dur}


def test_a_trace_is_counted_by_what_runs_on_the_device_and_what_the_host_starts():
    trace = {
        "traceEvents": [
            event("kernel", "gemm", 5),
            event("kernel", "gemm", 7),
            event("kernel", "norm", 2),
            event("gpu_memcpy", "Memcpy HtoD"),
            event("gpu_memset", "Memset"),
            event("cuda_runtime", "cudaLaunchKernel"),
            event("cuda_driver", "cuLaunchKernelEx"),
            event("cuda_runtime", "cudaGraphLaunch"),
            event("cuda_runtime", "cudaMemcpyAsync"),
            event("cuda_runtime", "cudaStreamSynchronize"),
            event("cpu_op", "aten::mm"),
            {"name": "no category"},
        ]
    }
    counts, spent = profiling.events_of(trace)
    assert counts == {"kernels": 3, "copies": 1, "fills": 1, "launches": 4}
    assert spent == {"gemm": 12, "norm": 2}


def test_tokens_are_profiled_by_the_difference_of_two_answers(monkeypatch):
    ran = []

    def traced(work, device):
        work()
        kernels = 100 + 10 * ran[-1]
        return {"traceEvents": [event("kernel", "gemm", 3)] * kernels}

    class Asked(Workload):
        def run(self, model, num_tokens=None):
            ran.append(self.num_tokens)

    monkeypatch.setattr(profiling, "traced", traced)
    found = profiling.profile_tokens(SimpleNamespace(device=None), Asked(None, None, [], 1))
    assert found["per_token"] == {"kernels": 10, "copies": 0, "fills": 0, "launches": 0}
    assert found["busy_ms"] == pytest.approx(0.03) and found["top"] == [("gemm", 30)]
