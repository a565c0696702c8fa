"""Answers say which patches they kept, how those meet boxes, and what they cost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava.eval import avg_tokens, mask_report
from llava.eval.answering import kept_masks
from llava.eval.answering.measuring import new_tokens
from llava.eval.benchmarks import viscot
from llava.eval.files import box_counts, costs
from llava.eval.files.mask_files import REFERENCE, mask_path, read_mask, write_mask
from tests.eval import eval_cases
from tests.paths import GOLDEN, ROOT

TINY, QWEN = "tiny-llava-v1.5", "tiny-qwen2.5-vl-cut"
BOX = [10, 20, 90, 60]


def questions(folder: Path, sizes) -> Path:
    records = []
    for number, size in enumerate(sizes):
        name = f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
        turns = ["<image>\nWhat is it?", "[0, 0, 1, 1]", "<image>", "a cat"]
        records.append(
            {
                "question_id": number,
                "image": [name, f"{name}###{json.dumps(BOX)}"],
                "conversations": [{"value": turn} for turn in turns],
            }
        )
    path = folder / "gqa.json"
    path.write_text(json.dumps(records))
    return path


def ask(folder: Path, checkpoint: str, *options: str, sizes=((120, 80), (80, 120), (100, 100))):
    path = folder / "a.jsonl"
    asked = questions(folder, sizes)
    argv = ["--model-path", GOLDEN / checkpoint, "--question-file", asked, "--temperature", 0]
    argv += ["--image-folder", folder, "--answers-file", path, "--device", "cpu"]
    argv += ["--dtype", "float32", "--max_new_tokens", 3, "--save-masks", *options]
    eval_cases.run_program("llava.eval.model_vqa_viscot", list(map(str, argv)))
    return path, eval_cases.read_answers(path)


@pytest.mark.parametrize("checkpoint, budget", [(TINY, 40), (QWEN, 3)])
def test_masks_hold_what_was_kept_on_the_grid_of_each_image(checkpoint, budget, tmp_path):
    options = ["--pruning-method", "random", "--visual-token-num", budget, "--batch-size", 3]
    path, answers = ask(tmp_path, checkpoint, *map(str, options))
    for number, answer in enumerate(answers):
        kept, _ = read_mask(mask_path(str(path), number))
        inside, _ = read_mask(mask_path(str(path), number, kind=REFERENCE))
        assert kept.shape == inside.shape and kept.sum() == budget
        assert kept.size == answer["metadata"]["visual_tokens_unpruned"]
        assert answer["metadata"]["boxes"] == box_counts.counts(kept, inside)
    shapes = {read_mask(mask_path(str(path), number))[0].shape for number in range(3)}
    assert len(shapes) == (3 if checkpoint == QWEN else 1)
    found = json.loads((tmp_path / "a_info.json").read_text())
    assert found["call_count"] == 3 and found["avgNumGenTokens"] <= 3 and found["avg_time"] > 0
    assert found["mRatio"] == pytest.approx(
        np.mean([budget / answer["metadata"]["visual_tokens_unpruned"] for answer in answers])
    )
    assert found["args"]["pruner"].startswith("random") or "Random" in found["args"]["pruner"]


def test_boxes_are_placed_on_the_square_that_an_image_is_padded_to(tmp_path):
    path, _ = ask(tmp_path, TINY, sizes=[(120, 80)])
    inside, _ = read_mask(mask_path(str(path), 0, kind=REFERENCE))
    side = len(inside)
    rows, columns = inside.any(axis=1).nonzero()[0], inside.any(axis=0).nonzero()[0]
    assert (columns[0], columns[-1]) == (int(10 / 120 * side), int(90 / 120 * side))
    assert (rows[0], rows[-1]) == (int(40 / 120 * side), int(80 / 120 * side))
    assert read_mask(mask_path(str(path), 0))[0].all()  # nothing was pruned


def test_a_glimpse_answers_nothing_and_counts_the_same(tmp_path):
    options = ["--pruning-method", "fastv", "--visual-token-num", "40"]
    _, answered = ask(tmp_path, TINY, *options)
    _, looked = ask(tmp_path, TINY, *options, "--do-func-name", "glimpse", "--overwrite")
    assert [answer["text"] for answer in looked] == [""] * 3
    assert all(answer["text"] for answer in answered)
    for ours, theirs in zip(looked, answered, strict=True):
        assert ours["metadata"]["boxes"] == theirs["metadata"]["boxes"]
        assert ours["metadata"][costs.NEW_TOKENS] == 1


def test_what_an_answer_cost_follows_from_the_tokens_in_every_layer(tmp_path):
    _, pruned = ask(tmp_path, TINY, "--pruning-method", "random", "--visual-token-num", "1")
    _, whole = ask(tmp_path, TINY, "--overwrite", "--batch-size", "2")
    for ours, theirs in zip(pruned, whole, strict=True):
        ours, theirs = ours["metadata"][costs.FLOPS], theirs["metadata"][costs.FLOPS]
        assert ours[costs.PREFILL] < ours[costs.PREFILL_UNPRUNED] == theirs[costs.PREFILL]
        assert ours[costs.DECODE] < ours[costs.DECODE_UNPRUNED]
        assert theirs[costs.DECODE] == theirs[costs.DECODE_UNPRUNED]


def test_masks_of_the_boxes_keep_what_they_cover(tmp_path):
    path, words = tmp_path / "a.jsonl", []
    playground = ROOT / "playground"
    argv = ["--question-file", playground / "samples/viscot/benchmark/gqa.json", "--limit", 4]
    argv += ["--image-folder", playground / "benchmark/images", "--temperature", 0]
    argv += ["--answers-file", path, "--pruning-method", "glimpseprune", "--save-masks"]
    argv += ["--batch-size", 2, "--dtype", "float32", "--brief"]
    for more in (["--use-ref-masks"], ["--use-zero-masks", "--overwrite"], ["--overwrite"]):
        eval_cases.run_program("llava.eval.model_vqa_viscot", [*map(str, argv), *more])
        words.append(eval_cases.read_answers(path))
    boxes, nothing, glimpse = words
    assert [answer["metadata"]["boxes"]["iou"] for answer in boxes] == [1.0] * 4
    assert [answer["metadata"]["visual_tokens_at_end"] for answer in nothing] == [1] * 4
    summary = box_counts.summarize(glimpse)
    assert summary["mIoU"] > 0.5 and summary["mRatio"] < 0.1
    assert [answer["text"] for answer in boxes] == [answer["answer"] for answer in boxes]


def test_masks_of_boxes_need_a_method_that_takes_them_and_boxes(tmp_path):
    with pytest.raises(SystemExit, match="need a pruning method with the option ref_boxes, none"):
        ask(tmp_path, TINY, "--use-ref-masks")


@pytest.mark.parametrize("text", ["[1, 2, 3]", "[1, 2, 3, true]", "[NaN, 2, 3, 4]", "a box"])
def test_a_broken_box_is_named(text, tmp_path):
    asked = questions(tmp_path, [(40, 40)])
    asked.write_text(asked.read_text().replace(json.dumps(BOX), text))
    argv = ["--model-path", GOLDEN / TINY, "--question-file", asked, "--image-folder", tmp_path]
    with pytest.raises(SystemExit, match=r"its box .* is not \[x1, y1, x2, y2\]"):
        eval_cases.run_program("llava.eval.model_vqa_viscot", list(map(str, argv)))


def test_corners_of_a_box_may_come_in_any_order():
    record = {"image": ["a.png", "a.png###[90, 60, 10, 20]"]}
    assert viscot.boxes_of(record) == [BOX]


def test_a_box_beside_its_image_is_named_and_not_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(globals(), "BOX", [500, 500, 600, 600])
    options = ["--pruning-method", "random", "--visual-token-num", "40"]
    _, answers = ask(tmp_path, TINY, *options, sizes=[(120, 80)])
    assert "question 0" in (said := capsys.readouterr().err)
    assert "a box lies beside what the model sees of its image" in said
    assert "boxes" not in answers[0]["metadata"]
    argv = ["avg_tokens", "--model-path", GOLDEN / TINY, "--image-folder", tmp_path]
    monkeypatch.setattr("sys.argv", [*map(str, argv), str(tmp_path / "gqa.json")])
    with pytest.raises(SystemExit, match="question 0 .* lies beside the image 0.png"):
        avg_tokens.main()


def test_reference_masks_are_not_made_of_a_box_beside_its_image(tmp_path):
    asked = tmp_path / "gqa.json"
    records = json.loads((ROOT / "playground/samples/viscot/benchmark/gqa.json").read_text())[:1]
    name = records[0]["image"][0]
    records[0]["image"][1] = f"{name}###[500, 500, 600, 600]"
    asked.write_text(json.dumps(records))
    argv = ["--question-file", asked, "--image-folder", ROOT / "playground/benchmark/images"]
    argv += ["--answers-file", tmp_path / "a.jsonl", "--pruning-method", "glimpseprune"]
    with pytest.raises(SystemExit, match="question 0 .*a box lies beside its image"):
        eval_cases.run_program("llava.eval.model_vqa_viscot", [*map(str, argv), "--use-ref-masks"])


def test_counts_and_their_means_are_those_of_summed_tokens():
    kept, wanted = np.array([[1, 1, 0, 0]], bool), np.array([[0, 1, 1, 1]], bool)
    assert box_counts.counts(kept, wanted) == {
        "kept_inside": 1,
        "kept_outside": 1,
        "dropped_inside": 2,
        "tokens": 4,
        "iou": 0.25,
    }
    lines = [
        {"metadata": {"boxes": box_counts.counts(*pair), "visual_tokens": 2} | tokens}
        for pair, tokens in (
            ((kept, wanted), {"visual_tokens_unpruned": 4}),
            ((wanted, wanted), {"visual_tokens_unpruned": 4, "visual_tokens_at_end": 3}),
        )
    ]
    assert box_counts.summarize([*lines, {"metadata": {}}]) == {
        "mPrecision": 0.8,
        "mRecall": pytest.approx(4 / 6),
        "mF1": pytest.approx(8 / 11),
        "mIoU": pytest.approx(4 / 7),
        "mRatio": pytest.approx((0.5 + 0.75) / 2),
        "inBoxes": 0.75,
        "count": 2,
    }
    assert box_counts.summarize([{"text": "a"}]) is None


def test_a_method_whose_tokens_have_no_place_leaves_no_mask(tmp_path):
    path, answers = ask(tmp_path, TINY, "--pruning-method", "pool")
    assert not Path(mask_path(str(path), 0)).exists()
    assert all("boxes" not in answer["metadata"] for answer in answers)
    assert kept_masks.metadata(None) == {}


def test_new_tokens_end_with_the_end_mark():
    assert new_tokens(torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 2, 2, 2]]), {2}) == [2, 4, 1]


def test_a_mask_comes_back_as_it_was_written(tmp_path):
    mask = np.random.default_rng(0).random((5, 9)) > 0.5
    path = mask_path(str(tmp_path / "a.jsonl"), 7, image=1)
    assert path.endswith("a_masks/7_1.png") and read_mask(path) is None
    write_mask(mask, path, frames=[(0, 0, 9, 5)])
    found, frames = read_mask(path)
    assert (found == mask).all() and frames == [[0, 0, 9, 5]]
    assert len(list(Path(path).parent.iterdir())) == 1
    Path(path).write_text("no picture")
    with pytest.raises(ValueError, match="7_1.png is no mask"):
        read_mask(path)


def test_the_report_names_sets_and_their_mean(tmp_path, monkeypatch, capsys):
    kept, wanted = np.array([[1, 1, 0, 0]], bool), np.array([[1, 1, 1, 1]], bool)
    paths = []
    for name, pair in (("gqa", (kept, wanted)), ("vsr", (wanted, wanted))):
        path = tmp_path / "viscot/answers" / name / "model/method/n_all.jsonl"
        path.parent.mkdir(parents=True)
        metadata = {"boxes": box_counts.counts(*pair)}
        line = {"question_id": 0, "text": "", "metadata": metadata}
        path.write_text(json.dumps(line) + "\n")
        paths.append(str(path))
    monkeypatch.setattr("sys.argv", ["mask_report", *paths])
    mask_report.main()
    shown = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in shown[2:5]] == ["| gqa", "| vsr", "| mean"]
    assert json.loads(shown[-1])["mean"]["mRecall"] == 0.75
    Path(paths[0]).write_text('{"question_id": 0, "text": "a"}\n')
    with pytest.raises(ValueError, match="no answer says how its tokens meet boxes"):
        mask_report.summaries(paths)
    assert list(mask_report.summaries(paths, where_known=True)) == ["vsr"]
    assert f"note: {paths[0]}: no answer says" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", [TINY, QWEN])
def test_the_share_inside_boxes_needs_no_answers(checkpoint, tmp_path, monkeypatch, capsys):
    path, answers = ask(tmp_path, checkpoint)
    argv = ["avg_tokens", "--model-path", GOLDEN / checkpoint, "--image-folder", tmp_path]
    monkeypatch.setattr(
        "sys.argv", [*map(str, argv), "--device", "cpu", str(tmp_path / "gqa.json")]
    )
    avg_tokens.main()
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["gqa"] == pytest.approx(box_counts.summarize(answers)["inBoxes"])
