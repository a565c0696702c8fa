"""One prompt on two devices, or two ways: what both gave, and how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from PIL import Image
from torch import Tensor

from llava.eval.efficiency.measure import check_image
from llava.front_end import FrontEnd
from llava.model_args import add_asking_args, load_front_end
from llava.playground import default_image, default_model_path
from llava.program_parser import ProgramParser
from llava.pruning import METHODS, Pruner, PruningTrace, trace_pruning
from tests.conftest import make_pruner
from tests.paths import GOLDEN

gpu = pytest.mark.gpu
CUDA_ALONE = [pytest.param("cuda", marks=gpu)]
DEVICES = ["cpu", *CUDA_ALONE]

#: checkpoint -> its folder, the image, and a budget that all methods know there, or nearly all
CHECKPOINTS = {
    "llava-1.5": (GOLDEN / "tiny-llava-v1.5", GOLDEN / "images/img1_640x360.png", 64),
    "llava-next": (GOLDEN / "tiny-llava-v1.6", GOLDEN / "images/img1_640x360.png", 640),
    "qwen2.5-vl": (GOLDEN / "tiny-qwen2.5-vl-cut", GOLDEN / "images/img2_300x480.png", 36),
    "playground": (None, None, 64),
}
QUESTION = "What color is the ring?\nAnswer the question using a single word or phrase."
METHOD_NAMES = [*METHODS.own, "vispruner+fastv"]
#: those that also run on the CPU, in the quick tests
FEW = ("none", "fastv")
#: share of the kept tokens that may be others: of scores within rounding either may win
TIES = 0.04
#: least gap between the two best logits of a step whose token counts
CLEAR = 1e-2


def usable(place: str) -> torch.device:
    """The device; skips the test where it is not there."""
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device(place)


@lru_cache(maxsize=8)
def loaded(checkpoint: str, device: torch.device, *words: str) -> FrontEnd:
    """A model of `CHECKPOINTS` in float32 on a device; words: further options, which win."""
    folder = CHECKPOINTS[checkpoint][0] or default_model_path()
    parser = ProgramParser()
    add_asking_args(parser)
    given = ["--model-path", str(folder), "--device", str(device), "--dtype", "fp32", *words]
    return load_front_end(parser.parse_args(given))


def inputs_of(front: FrontEnd, checkpoint: str, question: str = QUESTION) -> dict:
    """The arguments of `generate` for the question about the image of a checkpoint."""
    image = Image.open(CHECKPOINTS[checkpoint][1] or default_image()).convert("RGB")
    ids = front.encode(front.prompt(question, 1))
    return front.inputs([ids], [[front.picture(image)]], [question])


def method_for(front: FrontEnd, checkpoint: str, name: str) -> Pruner:
    """A method in use on a model of `CHECKPOINTS`; skips the test where it does not run there."""
    try:
        pruner = make_pruner(name, CHECKPOINTS[checkpoint][2])
        front.model.pruner = pruner
        check_image(pruner, front.model, None)
    except ValueError as error:
        pytest.skip(f"{name} does not run on {checkpoint}: {error}")
    return pruner


@dataclass
class Seen:
    """What one call of `generate` gave; scores (steps, B, vocabulary)."""

    tokens: Tensor
    scores: Tensor
    trace: PruningTrace

    def kept(self) -> dict[str, set[int]]:
        """Tokens that are left, by the place where others went."""
        found = {
            f"image {n}": set(own.tolist()) for n, own in enumerate(self.trace.visual_positions)
        }
        for layer, rows in self.trace.decoder_keep.items():
            for row, own in enumerate(rows):
                found[f"layer {layer}, row {row}"] = set(own.tolist())
        return found


def answered(model, inputs: dict, pruner: Pruner | None = None, tokens: int = 6, **more) -> Seen:
    """Greedy answers; pruner: None for the one in use."""
    if pruner is not None:
        model.pruner = pruner
    with torch.no_grad(), trace_pruning(model) as trace:
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=-1,
            output_scores=True,
            return_dict_in_generate=True,
            **more,
        )
    return Seen(out.sequences.cpu(), torch.stack(out.scores).float().cpu(), trace)


def assert_alike(own: Seen, wanted: Seen, atol: float, ties: float = 0.0) -> str:
    """Same tokens kept, first logits within `atol`, same tokens of the answer as long as they are
    clear. Returns what was found, in words.

    ties: share of the kept tokens that may be others; where any are, only their numbers count
    """
    ours, theirs = own.kept(), wanted.kept()
    assert ours.keys() == theirs.keys()
    others = 0
    for place, kept in ours.items():
        assert len(kept) == len(theirs[place]), place
        different = len(kept - theirs[place])
        assert different <= ties * len(kept), f"{place}: {different} of {len(kept)} are others"
        others += different
    for one, other in zip(own.trace.kv_lengths, wanted.trace.kv_lengths, strict=True):
        assert torch.equal(one.cpu(), other.cpu())
    if others:
        return f"{others} kept tokens are others: ties within rounding"
    apart = (own.scores[0] - wanted.scores[0]).abs()
    apart = apart[wanted.scores[0].isfinite()].max().item()
    assert apart <= atol, f"logits differ by {apart:.3g}, {atol:.3g} is allowed"
    best = wanted.scores.topk(2, dim=-1).values
    clear = ((best[..., 0] - best[..., 1]) > max(CLEAR, 2 * atol)).all(dim=1)
    steps = int(clear.long().cumprod(0).sum())
    assert torch.equal(own.tokens[:, :steps], wanted.tokens[:, :steps])
    return f"logits within {apart:.1e}, {steps} of {len(clear)} tokens clear and equal"
