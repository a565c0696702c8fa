"""Shell scripts of the benchmarks: each runs, scores, writes what its server takes, asks its judge.

Answers come from tests/eval/fake_answers.py, so that no model is loaded; that the programs take the
options they are given is tested at the end, with a model.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.eval import eval_cases, fake_answers
from tests.eval.stub_judge import stub_judge
from tests.paths import ROOT
from tests.repeated import others_slow

UPLOADS = {
    "vizwiz/answers_upload/llava_test": ".json",
    "mmbench_cn/answers_upload/mmbench_dev_cn_20231003": ".xlsx",
    "seed_bench/answers_upload/llava-seed-bench": ".jsonl",
    "mm-vet/results/llava-mm-vet": ".json",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with questions for every script."""
    folder = tmp_path_factory.mktemp("data")
    for source in ("samples", "benchmark"):
        own = ROOT / "playground" / source
        shutil.copytree(own, folder, dirs_exist_ok=True)
    # Its annotations have the name of those of the other split, which came last.
    (folder / "vqav2/llava_vqav2_mscoco_val2014.jsonl").unlink()
    return folder


@pytest.fixture(scope="module")
def fake_python(tmp_path_factory):
    return fake_answers.interpreter(tmp_path_factory.mktemp("bin"))


@pytest.fixture
def run(data, fake_python):
    def run(script, *argv, cwd=None, **environment):
        environment = {
            "DATA_DIR": str(data),
            "PYTHON": str(fake_python),
            "CUDA_VISIBLE_DEVICES": "",
            "JUDGE_WORKERS": "1",
            **environment,
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI")}
        return subprocess.run(
            ["bash", ROOT / "scripts" / script, *argv],
            env={**inherited, **environment},
            cwd=cwd,
            capture_output=True,
            encoding="utf-8",
        )

    return run


def last_line(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def verdict(number, body):
    """What a judge says to each of the three kinds of request."""
    text = json.dumps(body["messages"])
    if "proofreading" in text:
        return "score: 0.5"
    return "8 6\nbecause" if "[Assistant 1]" in text else "0.3"


@pytest.mark.slow
def test_all_benchmarks_run_and_end_in_one_table(run, data):
    with stub_judge(verdict) as server:
        done = run("v1_5/eval/all.sh", "64", LIMIT="2", OPENAI_BASE_URL=server.url)
    scores = last_line(done)
    names = "pope gqa vqav2 vizwiz vizwiz_val mmbench_cn seed sqa qbench qbench_test qbench_zh"
    names += " refcoco refcoco_testB refcoco+_testA refcocog_test llavabench mmvet viscot_textvqa"
    assert set(names.split()) <= scores.keys()
    judged = {name: scores[name] for name in ("llavabench", "mmvet", "viscot_gqa")}
    assert judged == pytest.approx({"llavabench": 75, "mmvet": 30, "viscot_gqa": 50})
    assert [name for name, score in scores.items() if score is None] == ["vizwiz", "qbench_test"]
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert table.pop(1).startswith("| --- ")
    assert len(table) == len(scores) + 2  # the header, and the mean of Visual-CoT
    assert "| viscot, mean | judge's score | 50.00 | 4 |  |" in table
    assert all("| 32.0 |" in line for line in table[1:] if "mean" not in line)
    path = "pope/answers/llava_pope_test/llava-v1.5-playground/vispruner/n_64_limit2.argv.json"
    argv = json.loads((data / path).read_text())
    assert "--pruning-method vispruner --visual-token-num 64 --limit 2" in " ".join(argv)


@pytest.mark.parametrize("folder", others_slow(UPLOADS))
def test_the_file_for_a_server_lies_in_place_of_the_answers(run, data, folder):
    if UPLOADS[folder] == ".xlsx":
        pytest.importorskip("openpyxl")
    script = {"seed_bench": "seed", "mm-vet": "mmvet"}.get(folder.split("/")[0])
    script = script or folder.split("/")[0]
    done = run(f"v1_6/eval/{script}.sh", "320", CKPT="some/model-7b")
    summary = last_line(done)
    path = data / folder / "model-7b/vispruner" / f"n_320{UPLOADS[folder]}"
    assert path.exists() and f"for the server: {path}" in done.stdout
    assert (summary["score"] is None) == (script in ("vizwiz", "mmvet"))


def test_the_table_takes_no_hidden_answers_for_a_judge_that_is_missing(run):
    path = Path(last_line(run("v1_5/eval/qbench.sh", "test", LIMIT="2"))["answers_file"])
    result = json.loads(path.with_suffix(".score.json").read_text())
    assert result["score"] is None and result["why"] == "answers not public"


def test_every_script_of_a_generation_is_there_for_the_others():
    names = {path.name for path in (ROOT / "scripts/v1_5/eval").iterdir()}
    for family in ("v1_6", "qwen2_5_vl"):
        folder = ROOT / "scripts" / family / "eval"
        assert {path.name for path in folder.iterdir()} == names
        for path in folder.iterdir():
            assert f'v1_5/eval/{path.name}" "$@"' in path.read_text() and os.access(path, os.X_OK)


QWEN = "playground/checkpoints/qwen2.5-vl-playground"
QWEN_BUDGETS = {
    "tokens": (["128"], {}, "--visual-token-num 128", "vispruner/n_128"),
    "a share, and the next option by place": (
        ["0.111", "0.7"],
        {},
        "--pruning-arg visual_token_ratio=0.111 --pruning-arg important_ratio=0.7",
        "vispruner/n_default_visual_token_ratio=0.111_important_ratio=0.7",
    ),
    "a share of no method": (
        ["0.222"],
        {"METHOD": "none"},
        "--pruning-method none --limit",
        "none/n_all",
    ),
}


@pytest.mark.parametrize(
    "words, environment, given, label", others_slow(QWEN_BUDGETS.values()), ids=QWEN_BUDGETS
)
def test_scripts_of_qwen_ask_its_playground(run, words, environment, given, label):
    done = run("qwen2_5_vl/eval/pope.sh", *words, LIMIT="2", **environment)
    path = Path(last_line(done)["answers_file"])
    assert str(path).endswith(f"/qwen2.5-vl-playground/{label}_limit2.jsonl")
    argv = " ".join(json.loads(path.with_suffix(".argv.json").read_text()))
    assert f"--model-path {QWEN} " in argv and given in argv


@pytest.mark.parametrize("name", ["Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"])
def test_another_model_of_qwen_is_named_by_ckpt(run, name):
    path = Path(last_line(run("qwen2_5_vl/eval/pope.sh", CKPT=name, LIMIT="2"))["answers_file"])
    argv = json.loads(path.with_suffix(".argv.json").read_text())
    assert argv[argv.index("--model-path") + 1] == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_a_missing_folder_of_qwen_says_where_the_published_one_is(run, tmp_path):
    done = run("qwen2_5_vl/eval/pope.sh", CKPT_DIR=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == (
        f"error: there is no checkpoint {tmp_path}/Qwen2.5-VL-7B-Instruct; the published ones are "
        "at https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct\n"
    )


@pytest.mark.slow
def test_a_script_of_qwen_answers_with_a_model(run, data):
    done = run(
        "qwen2_5_vl/eval/pope.sh",
        "0.375",
        LIMIT="2",
        PYTHON=sys.executable,
        CKPT=str(ROOT / "tests/golden/tiny-qwen2.5-vl-cut"),
        EXTRA="--device cpu --max_new_tokens 2 --max-pixels 18816",  # 16 tokens a square
    )
    summary = last_line(done)
    assert summary["visual_tokens"] == 6.0
    assert len(Path(summary["answers_file"]).read_text().splitlines()) == 2


def test_of_several_machines_the_first_one_scores(run):
    done = run("v1_5/eval/pope.sh", "64", LAUNCH="--num_machines 2 --machine_rank 1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "pope: scored on the machine of rank 0"


def test_a_folder_is_the_checkpoint_and_a_limit_among_the_words_is_one_for_scoring(run, tmp_path):
    own = ROOT / "tests/golden/tiny-llava-v1.5"
    given = dict(CKPT=str(own), CKPT_DIR=str(tmp_path), LAUNCH="--machine-rank=0")
    path = last_line(run("v1_5/eval/pope.sh", "64", "--limit", "4", **given))["answers_file"]
    assert path.endswith("/tiny-llava-v1.5/vispruner/n_64_limit4.jsonl")


def test_a_script_may_be_called_from_another_folder(run, tmp_path):
    for name in ("my model", "my twig"):
        (tmp_path / name).mkdir()
    words = ("64", "twig=my twig")
    done = run("v1_6/eval/pope.sh", *words, cwd=tmp_path, BASE_MODEL="my model", LIMIT="2")
    path = Path(last_line(done)["answers_file"])
    argv = json.loads(path.with_suffix(".argv.json").read_text())
    assert f"{tmp_path}/my model" in argv and f"twig={tmp_path}/my twig" in argv


def test_checkpoints_of_two_trainings_have_folders_of_their_own(run, tmp_path):
    for training in ("first", "second"):
        checkpoint = tmp_path / training / "checkpoint-500"
        checkpoint.mkdir(parents=True)
        path = last_line(run("v1_5/eval/pope.sh", CKPT=str(checkpoint), LIMIT="2"))["answers_file"]
        assert path.endswith(f"/{training}_checkpoint-500/none/n_all_limit2.jsonl")


@pytest.mark.parametrize("words", ["--limit 4", "--num_samples=4", "--skip-bad --brief"])
def test_extra_options_that_scoring_has_to_know_are_refused_with_what_to_set(run, words):
    done = run("v1_5/eval/pope.sh", EXTRA=words)
    assert done.returncode == 1 and not done.stdout
    meant = "BRIEF=1" if "brief" in words else "LIMIT=N"
    assert f"of which scoring would not know: set {meant} in its place" in done.stderr


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_a_script_explains_itself_without_asking_anything(run, word):
    done = run("qwen2_5_vl/eval/pope.sh", "64", word)
    assert done.returncode == 0 and "mean F1" in done.stdout and "LIMIT " in done.stdout
    assert "{" not in done.stdout and not done.stderr


def test_without_tokens_a_method_has_its_own_budget_and_the_summary_says_what_it_kept(run, data):
    done = run("v1_5/eval/refcocog.sh", "threshold=0.4", METHOD="fastervlm", SPLIT="test")
    summary = last_line(done)
    assert summary["answers_file"].endswith("/fastervlm/n_default_threshold=0.4.jsonl")
    assert summary["visual_tokens"] == 32.0
    assert "Visual tokens per layer: 32.0 on average (5.6 % of all)" in done.stdout
    argv = json.loads(Path(summary["answers_file"]).with_suffix(".argv.json").read_text())
    assert "--visual-token-num" not in argv and "threshold=0.4" in argv
    details = json.loads(Path(summary["answers_file"]).with_suffix(".score.json").read_text())
    assert details["visual_tokens"]["histogram"] == [24] + 9 * [0]


PUBLISHED = {
    "VisPruner's": (["64", "0.5"], {}, "vispruner/n_64_important_ratio=0.5"),
    "VisPruner's flags": (
        ["--visual_token_num", "64", "--important_ratio", "0.5"],
        {},
        "vispruner/n_64_important_ratio=0.5",
    ),
    "TwigVLM's": (["-R", "64", "--twig", "a/b"], {}, "twigvlm/n_64_twig=a-b"),
    "GlimpsePrune's": (
        [],
        {"METHOD": "glimpseprune", "MAX_REMAIN_RATIO": "0.2"},
        "glimpseprune/n_default_max_remain_ratio=0.2",
    ),
}


@pytest.mark.parametrize(
    "words, environment, label", others_slow(PUBLISHED.values()), ids=PUBLISHED
)
def test_words_of_published_scripts_reach_the_program(run, words, environment, label):
    path = last_line(run("v1_5/eval/pope.sh", *words, LIMIT="2", **environment))["answers_file"]
    assert path.endswith(f"/{label}_limit2.jsonl")
    argv = json.loads(Path(path).with_suffix(".argv.json").read_text())
    method, option = label.split("/")[0], label.split("_", 2)[2].replace("-", "/")
    given = ["--visual-token-num", "64"] if "n_64" in label else []
    start = argv.index("--pruning-method")
    assert argv[start:] == [
        *("--pruning-method", method, *given, "--pruning-arg", option, "--limit", "2"),
        *("--answers-file", path),
    ]


RELEASED = {
    "masks alone": (
        "qwen2_5_vl",
        {"DO_GLIMPSE": "1", "SAVE_MASKS": "1", "METHOD": "glimpseprune", "MIN_REMAIN_NUM": "4"},
        ["--do-func-name glimpse", "--save-masks", "--pruning-arg min_remain_num=4"],
        "glimpseprune/n_default_min_remain_num=4_limit2_glimpse.jsonl",
    ),
    "boxes": (
        "v1_5",
        {"USE_REF": "1", "ATTN_IMPL": "eager", "METHOD": "glimpseprune", "BRIEF": "1"},
        ["--use-ref-masks", "--attn-implementation eager", "--brief"],
        "glimpseprune/n_default_limit2_use_ref_eager_brief.jsonl",
    ),
    "switches that are off": (
        "v1_5",
        {"USE_REF": "0", "DO_GLIMPSE": "False", "BRIEF": "0", "TIME_LOGGER": "1"},
        ["--pruning-method none"],
        "none/n_all_limit2.jsonl",
    ),
}


@pytest.mark.parametrize(
    "family, environment, given, ending", others_slow(RELEASED.values()), ids=RELEASED
)
def test_variables_of_the_release_reach_visual_cot(run, data, family, environment, given, ending):
    done = run(f"{family}/eval/viscot.sh", SETS="gqa", NUM_SAMPLES="2", **environment)
    assert done.returncode == 0, done.stderr
    model = "llava-v1.5-playground" if family == "v1_5" else "qwen2.5-vl-playground"
    path = data / "viscot/answers/gqa" / model / ending
    argv = " ".join(json.loads(path.with_suffix(".argv.json").read_text()))
    assert all(words in argv for words in given)
    assert "| gqa | 2 | 0.0 % |" in done.stdout  # the kept tokens lie beside the boxes
    assert ("viscot_gqa" in done.stdout) == ("glimpse.jsonl" not in ending)


@pytest.mark.slow
def test_visual_cot_ends_with_its_scores_where_tokens_have_no_place_in_the_image(run, data):
    done = run("v1_5/eval/viscot.sh", "64", METHOD="pool", SETS="gqa", LIMIT="2")
    assert done.returncode == 0, done.stderr
    assert "note: " in done.stderr and "no answer says how its tokens meet boxes" in done.stderr
    assert '{"viscot_gqa": null}' in done.stdout


def test_every_script_that_is_called_by_its_name_is_executable():
    scripts = [path for path in (ROOT / "scripts").rglob("*.sh") if path.read_text()[:2] == "#!"]
    assert len(scripts) > 40
    assert not [str(path) for path in scripts if not os.access(path, os.X_OK)]


@pytest.mark.slow
def test_folders_of_the_release_are_words_of_visual_cot(run, data, tmp_path):
    parts, adapter = tmp_path / "parts", tmp_path / "adapter"
    parts.mkdir(), adapter.mkdir()
    done = run(
        "qwen2_5_vl/eval/viscot.sh",
        *map(str, (parts, adapter)),
        SETS="gqa",
        LIMIT="2",
        BASE_MODEL="Qwen/Qwen2.5-VL-3B-Instruct",
        ADAPTER_MERGE="0",
    )
    assert done.returncode == 0, done.stderr
    assert "note: ADAPTER_MERGE=0: adapters are merged" in done.stderr
    (path,) = (data / "viscot/answers/gqa/adapter").rglob("*.argv.json")
    argv = " ".join(json.loads(path.read_text()))
    assert f"--model-path {adapter} " in argv
    assert "--model-base Qwen/Qwen2.5-VL-3B-Instruct" in argv
    assert f"--pruning-method glimpseprune --pruning-arg new_modules={parts}" in argv


def test_words_and_variables_of_the_release_hold_for_every_benchmark(run, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(ROOT / "playground/benchmark/gqa", data / "gqa")
    shutil.copytree(ROOT / "playground/benchmark/images", data / "images")
    parts, adapter = tmp_path / "parts", tmp_path / "adapter"
    parts.mkdir(), adapter.mkdir()
    done = run(
        "qwen2_5_vl/eval/all.sh",
        *map(str, (parts, adapter)),
        DATA_DIR=str(data),
        BASE_MODEL="Qwen/Qwen2.5-VL-3B-Instruct",
        NUM_SAMPLES="2",
        ATTN_IMPL="eager",
        SAVE_MASKS="1",
        MAX_REMAIN_RATIO="0.111",
    )
    assert done.returncode == 0, done.stderr
    (path,) = (data / "gqa/answers").rglob("*.argv.json")
    assert path.name.endswith("_limit2_eager.argv.json") and "adapter/glimpseprune" in str(path)
    argv = " ".join(json.loads(path.read_text()))
    for words in (
        f"--model-path {adapter} ",
        "--model-base Qwen/Qwen2.5-VL-3B-Instruct",
        "--pruning-method glimpseprune",
        f"--pruning-arg new_modules={parts}",
        "--pruning-arg max_remain_ratio=0.111",
        "--attn-implementation eager",
        "--save-masks",
        "--limit 2",
    ):
        assert words in argv


def test_generation_without_a_cache_is_refused_with_its_reason(run):
    done = run("v1_5/eval/viscot.sh", SETS="gqa", NO_CACHE="1")
    assert done.returncode == 1
    assert "error: NO_CACHE=1: without a cache a method would choose anew" in done.stderr


def test_words_that_could_mean_several_methods_stop_the_script(run):
    done = run("v1_5/eval/pope.sh", "64", "layer=3")
    assert done.returncode == 1 and not done.stdout
    assert "error: 'layer' belongs to fastv, adaptprune, nuwa, dart: name one method" in done.stderr


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_the_script_for_any_benchmark_explains_itself_too(run, word):
    done = run("v1_6/eval/benchmark.sh", word)
    assert done.returncode == 0 and "NAME [TOKENS]" in done.stdout and "LIMIT " in done.stdout


@pytest.mark.parametrize("word", ["list", "--skip-bad"])
def test_the_script_for_any_benchmark_takes_no_other_word_for_one(run, word):
    done = run("v1_5/eval/benchmark.sh", word)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the first word must be the name of a benchmark, not ")


def test_a_number_of_processes_that_is_none_is_named(run):
    done = run("v1_5/eval/pope.sh", NPROC="all")
    assert done.returncode == 1 and done.stderr == "error: NPROC=all is not a number of processes\n"


@pytest.mark.parametrize("code, others", [(130, False), (137, True)])
def test_ctrl_c_stops_all_benchmarks_and_a_program_that_was_killed_does_not(
    run, data, tmp_path, code, others
):
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'[[ "$*" != *"-m llava.eval.model_vqa"* ]] || exit {code}\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    for name in ("pope", "textvqa", "images"):
        (tmp_path / name).symlink_to(data / name)
    done = run("v1_5/eval/all.sh", PYTHON=str(python), DATA_DIR=str(tmp_path))
    assert done.returncode == (1 if others else code)
    assert ("=== textvqa" in done.stdout) == others


@pytest.mark.slow
def test_a_benchmark_that_fails_does_not_stop_the_others(run, data, tmp_path):
    for name in ("pope", "qbench", "refcoco/refcoco+_testA", "viscot/benchmark/gqa"):
        for path in data.glob(f"{name}/*" if "/" not in name else f"{name}*"):
            copy_into(tmp_path, path, data)
    copy_into(tmp_path, data / "refcoco/llava_refcoco+_testA.jsonl", data)
    (tmp_path / "images").symlink_to(data / "images")
    (tmp_path / "pope/coco/coco_pope_random.json").write_text("{broken\n")
    with stub_judge(verdict) as server:
        done = run(
            "v1_5/eval/all.sh", "8", DATA_DIR=str(tmp_path), OPENAI_BASE_URL=server.url, LIMIT="2"
        )
    assert done.returncode == 1 and "error: pope failed" in done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])
    assert list(scores) == ["qbench", "qbench_test", "qbench_zh", "refcoco+_testA", "viscot_gqa"]
    assert scores["viscot_gqa"] == 50.0
    answers = "qbench/answers/llvisionqa_dev/llava-v1.5-playground/vispruner/n_8_limit2.jsonl"
    assert (tmp_path / answers).exists()


def copy_into(folder, path, root):
    target = folder / path.relative_to(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    elif "answers" not in path.parts:
        shutil.copy(path, target)


def test_a_judged_benchmark_without_a_judge_says_how_to_get_one_and_keeps_the_answers(run):
    done = run("v1_5/eval/llavabench.sh", "16")
    summary = last_line(done)
    assert summary["score"] is None and Path(summary["answers_file"]).exists()
    assert "set OPENAI_API_KEY, or OPENAI_BASE_URL to another endpoint" in done.stdout


PROGRAMS = [
    ("model_vqa_qbench", "qbench/llvisionqa_dev.json", ["--lang", "en"]),
    ("model_vqa_viscot", "viscot/benchmark/gqa.json", ["--brief"]),
]


@pytest.mark.parametrize("program, questions, options", PROGRAMS, ids=lambda case: str(case)[:16])
def test_the_new_programs_answer_with_a_model(program, questions, options, tmp_path):
    path = tmp_path / "a.jsonl"
    argv = ["--model-path", ROOT / "tests/golden/tiny-llava-v1.5", "--limit", 2, "--device", "cpu"]
    word = "--questions-file" if "qbench" in program else "--question-file"  # as LLaVA names it
    argv += [word, ROOT / "playground/samples" / questions, "--temperature", 0]
    argv += ["--image-folder", ROOT / "playground/benchmark/images", "--answers-file", path]
    argv += ["--max_new_tokens", 3, *options]
    eval_cases.run_program(f"llava.eval.{program}", list(map(str, argv)))
    first, second = eval_cases.read_answers(path)
    if "qbench" in program:
        assert list(first)[:3] == ["type", "concern", "question"]
        assert first["response"] == first["text"] != ""
        assert (
            first["prompt"].endswith(f"D. {first['candidates'][-1]}\n")
            or len(first["candidates"]) < 4
        )
    else:
        assert first["prompt"].endswith("\n\nAnswer the question using a single word or phrase.")
        assert "bounding box" not in first["prompt"] and first["answer"]
