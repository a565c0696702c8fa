"""Operations of answers: the recorded sums, and means over the lines of a file."""

import json
import sys

import pytest

from llava.eval.efficiency import flops
from llava.eval.files import costs
from llava.pruning.cost import DecoderShape, decode_flops, prefill_flops
from tests.golden_data import golden_json

RECORDED = golden_json("glimpseprune-qwen/utils.json")["flops_7b"]
SHAPE = DecoderShape(
    RECORDED["hidden_size"],
    RECORDED["intermediate_size"],
    RECORDED["num_layers"],
    RECORDED["num_heads"],
    RECORDED["num_key_value_heads"],
)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: str(case["seq_len"]))
def test_operations_of_the_decoder_are_the_recorded_ones(case):
    layers, whole = RECORDED["num_layers"], case["seq_len"]
    assert prefill_flops(SHAPE, [whole] * layers) == case["prefill_full"]
    assert decode_flops(SHAPE, [whole] * layers, case["gen_len"]) == case["decode_full"]
    dense = RECORDED["reduce_layer"] + 1
    pruned = [whole] * dense + [case["third_argument_prune_seq_len"]] * (layers - dense)
    # The release adds what it estimates for the predictor.
    assert prefill_flops(SHAPE, pruned) + case["vip"] == case["prefill_glimpseprune"]


def test_both_formulas_count_what_the_tokens_of_an_answer_look_at():
    small = DecoderShape(8, 16, 2, 2, 2)
    one = decode_flops(small, [10, 4], 1, "fastv")
    assert decode_flops(small, [10, 4], 2, "fastv") == 2 * one + 2 * 2 * 8
    with pytest.raises(ValueError, match="unknown formula 'other', choose from exact, fastv"):
        decode_flops(small, [10], 1, "other")


def line(number, prefill, new_tokens=4):
    known = {costs.PREFILL: prefill, costs.PREFILL_UNPRUNED: 4e12}
    known |= {costs.DECODE: 1e12, costs.DECODE_UNPRUNED: 2e12}
    metadata = {costs.NEW_TOKENS: new_tokens, costs.FLOPS: known, costs.MILLISECONDS: 10.0}
    return json.dumps({"question_id": number, "text": "a", "metadata": metadata}) + "\n"


def test_a_file_is_summed_up_without_a_model(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(line(0, 2e12) + line(1, 4e12, 2) + line(2, 9e12))
    monkeypatch.setattr(sys, "argv", ["flops", str(path), "--num-samples", "2"])
    flops.main()
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].endswith("| 2 | 3.0 | 3 | 75.0 % | 1 | 50.0 % | 66.7 % |")
    found = json.loads(shown[-1])[str(path)]
    assert (found["prefill_ratio"], found["ratio"]) == (0.75, pytest.approx(2 / 3))


def test_files_without_costs_and_empty_samples_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question_id": 0, "text": "a"}\n')
    with pytest.raises(ValueError, match="no line says what it cost; llava.eval.model_vqa_viscot"):
        flops.operations(str(path))
    with pytest.raises(ValueError, match="--num-samples 0 leaves no answer"):
        flops.operations(str(path), 0)
