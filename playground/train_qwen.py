"""Make the playground's Qwen2.5-VL: a new tower in front of the decoder of the playground's LLaVA.

    python -m playground.train_qwen all                  # all of it, in this order:
    python -m playground.train_qwen tower                # stage 1: see qwen_tower
    python -m playground.train_qwen places               # stage 2: the new layer of the decoder
    python -m playground.train_qwen answers              # stage 3: the decoder on questions
    python -m playground.train_qwen whole                # stage 4: everything on questions
    python -m playground.train_qwen save                 # write the checkpoint as it is now
    python -m playground.train_qwen glimpse              # a glimpse for it: see qwen_glimpse
    python -m playground.train_qwen plus                 # an adapter for pruned pictures
    python -m playground.train_qwen glimpse_plus         # a glimpse for the model with the adapter

Every stage has a time budget (--minutes, earlier runs count) and continues where it stopped.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from playground import qwen_files, qwen_glimpse, qwen_tower, scenes
from playground.clock import descend, half_precision, resume, save_state, write_line
from playground.decoder_model import WIDTH
from playground.decoder_text import fill_buckets
from playground.fast_train import FINDER_WEIGHT, answer_weights, judge, load_tower, tower_features
from playground.qwen_files import wording
from playground.qwen_model import QwenDecoder, start_from_llava
from playground.qwen_tower import DECODER, LARGE_GRIDS, TrainedTower, tensors, wanted_tokens
from playground.tower_model import IGNORE, PATCH
from playground.tower_model import WIDTH as TOWER_WIDTH
from playground.train import CHECKPOINTS, DATA, TOWER, run
from playground.train_tower import patch_targets, schedule

OUTPUT = CHECKPOINTS / "qwen2.5-vl-playground"
STATE = DATA / "qwen"
MINUTES = {
    "tower": 60,
    "places": 15,
    "answers": 60,
    "whole": 60,
    "glimpse": 45,
    "glimpse_plus": 15,
}
SQUARE = LARGE_GRIDS[0]  # what the tower of the playground's LLaVA sees
PICTURES = 3_000_000  # first of the training scenes of stages 2 and 3
HELD_OUT = scenes.HELD_OUT_SEEDS + 700_000_000


# Stage 2: places -----------------------------------------------------------------------------


class Places:
    """Layer 0 learns to give, for tokens as the tower of stage 1 should give them, what the old
    decoder read: the output of its projector for the same patch. Texts pass unchanged."""

    name, rate, texts = "places", 1e-3, 6

    def __init__(self, args: argparse.Namespace):
        weights = load_file(DECODER / "model.safetensors")
        self.decoder = QwenDecoder()
        start_from_llava(self.decoder, weights)
        self.words = qwen_tower.words(weights["model.embed_tokens.weight"])
        self.seen, self.wanted, self.shown = teach(args.pictures, self.words, weights)
        self.trained = nn.ModuleList([self.decoder.model.layers[0]])
        self.spread = self.wanted[self.shown].float().var()

    def loss(self, step: int) -> dict[str, Tensor]:
        """Mean squared error of pictures and of texts, as shares of the variance."""
        rng = np.random.default_rng((step, 11))
        chosen = torch.from_numpy(rng.choice(len(self.seen), 16, replace=False))
        return self._errors(chosen, rng)

    def _errors(self, chosen: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        shown = self.shown[chosen]
        order = torch.from_numpy(rng.random(tuple(shown.shape))) - 2.0 * shown
        kept = order.argsort(1)[:, :112]
        index = kept[..., None].expand(-1, -1, WIDTH)
        seen = self.seen[chosen].gather(1, index).float()
        seen = seen + 0.04 * torch.randn_like(seen)
        want = self.wanted[chosen].gather(1, index).float()
        texts = self._texts(chosen, rng)
        with half_precision():
            placed, passed = self.decoder.place(seen, places_of(kept, SQUARE), max(SQUARE), texts)
        real = texts[0] > 0
        return {
            "places": F.mse_loss(placed, want) / self.spread,
            "texts": passed[real.flatten(1)].square().mean() / self.spread,
        }

    def _texts(self, chosen: Tensor, rng: np.random.Generator) -> list[Tensor]:
        """Ids of some short questions per picture, in one bucket."""
        rows = []
        for index in chosen.tolist():
            filled, _ = fill_buckets(scenes.make_scene(PICTURES + index), rng, wording())
            rows.append(filled[0][0][: self.texts])
        return [torch.from_numpy(np.stack(rows))]

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """What is left of the variance."""
        found = self._errors(torch.arange(16), np.random.default_rng(0))
        return {name: float(value) for name, value in found.items()}


def teach(pictures: int, words: dict[str, Tensor], weights: dict[str, Tensor]):
    """(pictures, 576, width) tokens that stage 1 aims at and what the projector of the playground's
    LLaVA gives, bf16; and (pictures, 576) where something is shown."""
    seeds = range(PICTURES, PICTURES + pictures)
    projector = nn.Sequential(nn.Linear(TOWER_WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    name = "model.mm_projector."
    own = {key.removeprefix(name): value for key, value in weights.items() if name in key}
    projector.load_state_dict({key: value.float() for key, value in own.items()})
    tower = load_tower(TOWER)
    ideal = [ideal_tokens(scenes.make_scene(seed), words) for seed in seeds]
    seen, shown = (torch.stack(part) for part in zip(*ideal, strict=True))
    wanted = []
    with torch.no_grad():
        for first in range(0, pictures, 16):
            features = tower_features(tower, seeds[first : first + 16])
            wanted.append(projector(features.float()).bfloat16())
    return seen.bfloat16(), torch.cat(wanted), shown


def places_of(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(..., 2) rows and columns of tokens (...)."""
    return torch.stack([tokens // grid[1], tokens % grid[1]], -1)


# Stages 3 and 4: answers ---------------------------------------------------------------------


class Answers:
    """The decoder learns to answer in its new template, on pictures of several shapes. Tokens are
    those that stage 1 aims at, with noise: they cost little, so every picture is new."""

    name, rate, size, keep, noise = "answers", 6e-4, 4, 112, 0.04

    def __init__(self, args: argparse.Namespace):
        weights = load_file(DECODER / "model.safetensors")
        self.words = qwen_tower.words(weights["model.embed_tokens.weight"])
        self.decoder = QwenDecoder()
        start_from_llava(self.decoder, weights)
        self.finder = nn.Linear(WIDTH, 4)  # as in fast_train
        self.trained = nn.ModuleList([self.decoder, self.finder])
        layer = nn.ModuleList([self.decoder.model.layers[0]])
        layer.load_state_dict(reached(args.state, "places")["trained"])

    def loss(self, step: int) -> dict[str, Tensor]:
        """Weighted losses of the answers, and of the places of what questions name."""
        rng = np.random.default_rng((step, 13))
        grid = LARGE_GRIDS[int(rng.integers(len(LARGE_GRIDS)))] if step % 2 else SQUARE
        first = PICTURES + step * self.size
        keep = math.prod(grid) if step % 8 == 0 else self.keep
        batch = self.batch(range(first, first + self.size), grid, keep, rng)
        tokens, found = self.see(batch)
        logits, labels, middle, boxes = self.answer(tokens, batch)
        weights = answer_weights(batch, wording().end)
        answers = F.cross_entropy(logits, labels, reduction="none")
        found["answers"] = (answers * weights).sum() / weights.sum()
        missed = F.smooth_l1_loss(self.finder(middle), boxes, beta=0.02)
        return found | {"finder": FINDER_WEIGHT * missed}

    def batch(self, seeds: range, grid: tuple[int, int], keep: int, rng) -> dict:
        """Scenes on one grid, which of their tokens are kept (pictures, keep), and turns."""
        size = grid[1] * PATCH, grid[0] * PATCH
        batch = {"grid": grid, "scenes": [scenes.make_scene(seed, size) for seed in seeds]}
        kept, turns = [], []
        for scene in batch["scenes"]:
            shown = patch_targets(scene)["foreground"]
            order = np.argsort(rng.random(len(shown)) - 2.0 * shown)
            kept.append(np.sort(order[:keep]))
            turns.append(fill_buckets(scene, rng, wording()))
        batch["kept"] = torch.from_numpy(np.stack(kept))
        batch["asked"] = [asked for _, asked in turns]
        buckets = zip(*(filled for filled, _ in turns), strict=True)
        buckets = [list(zip(*rows, strict=True)) for rows in buckets]
        for number, name in enumerate(("ids", "labels", "boxes")):
            batch[name] = [np.stack(bucket[number]) for bucket in buckets]
        return batch

    def see(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (pictures, tokens, width) of the scenes, and losses of them."""
        tokens = torch.stack([ideal_tokens(scene, self.words)[0] for scene in batch["scenes"]])
        return tokens + self.noise * torch.randn(tokens.shape), {}

    def answer(self, tokens: Tensor, batch: dict):
        """Logits and labels at the supervised places, states half way up and boxes at the names."""
        kept, grid = batch["kept"], batch["grid"]
        ids = [torch.from_numpy(x) for x in batch["ids"]]
        labels = torch.cat([torch.from_numpy(x).flatten(1) for x in batch["labels"]], 1)
        boxes = torch.cat([torch.from_numpy(x).flatten(1, 2) for x in batch["boxes"]], 1)
        asked, named = labels != IGNORE, ~boxes[..., 0].isnan()
        seen = tokens.gather(1, kept[..., None].expand(-1, -1, WIDTH))
        with half_precision():
            states, middle, _ = self.decoder(seen, places_of(kept, grid), max(grid), ids)
            logits = self.decoder.lm_head(states[asked])
        return logits.float(), labels[asked], middle[named].float(), boxes[named].float()

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Share of right answers on held-out squares, and on held-out pictures of other shapes."""
        found = {}
        for kind, grids in (("", [SQUARE] * 3), ("other ", LARGE_GRIDS[1:4])):
            hits: dict[str, list[float]] = {}
            for number, grid in enumerate(grids):
                first = HELD_OUT + 100 * number
                rng = np.random.default_rng(number)
                batch = self.batch(range(first, first + 8), grid, math.prod(grid), rng)
                logits, labels, *_ = self.answer(self.see(batch)[0], batch)
                judge(logits, labels, batch["asked"], hits, wording())
            means = {task: float(np.mean(values)) for task, values in sorted(hits.items())}
            found |= {kind + task: value for task, value in means.items()}
            found[kind + "mean"] = float(np.mean(list(means.values())))
        return found


class Whole(Answers):
    """Tower, merger and decoder learn together, on pictures; the losses of stage 1 stay."""

    name, rate = "whole", 3e-4

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.tower = TrainedTower()
        self.tower.load_state_dict(reached(args.state, "tower")["model"])
        self.trained.load_state_dict(reached(args.state, "answers")["trained"])
        self.trained.append(self.tower)

    def see(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens that the tower makes of the pictures, and a tenth of its losses."""
        examples = [qwen_tower.describe(scene) for scene in batch["scenes"]]
        data = tensors({name: np.stack([e[name] for e in examples]) for name in examples[0]})
        with half_precision():
            tokens, logits = self.tower(data["patches"], batch["grid"])
            found = qwen_tower.losses((tokens, logits), data, self.words)
        return tokens.float(), {name: 0.1 * value for name, value in found.items()}


def ideal_tokens(scene: scenes.Scene, words: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(tokens, width) that stage 1 aims at, and (tokens,) where something is shown."""
    data = tensors(qwen_tower.targets(scene))
    return wanted_tokens(data, words), data["color"] != IGNORE


# Training ------------------------------------------------------------------------------------


def optimizers(module: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, AdamW for the rest."""
    matrices, others = [], []
    for name, parameter in module.named_parameters():
        small = parameter.ndim != 2 or "embed_tokens" in name or "lm_head" in name
        (others if small else matrices).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", ns_steps=4
    )
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.97), weight_decay=0.0)]


def train(stage, folder: Path, minutes: float, log_every: int) -> None:
    """Train a stage until its time budget is spent; keeps the state in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{stage.name}_state.pt"
    optimizer_list = optimizers(stage.trained, stage.rate)
    modules = {"trained": stage.trained}
    step, earlier = resume(file, modules, optimizer_list)
    began = kept = time.monotonic()
    recent: list[dict[str, float]] = []
    while (spent := earlier + time.monotonic() - began) < 60 * minutes:
        found, rate = stage.loss(step), stage.rate * schedule(spent / (60 * minutes))
        descend(sum(found.values()), stage.trained, optimizer_list, rate)
        step += 1
        recent.append({name: float(value.detach()) for name, value in found.items()})
        if step % log_every == 0:
            log(folder / f"{stage.name}_log.jsonl", step, spent, recent, stage.scores())
            recent = []
        if time.monotonic() - kept > 120:
            save_state(file, modules, optimizer_list, step, spent)
            kept = time.monotonic()
    save_state(file, modules, optimizer_list, step, spent)
    log(folder / f"{stage.name}_log.jsonl", step, spent, recent, stage.scores())


def reached(folder: Path, stage: str) -> dict:
    """What a stage has left in the folder. Raises FileNotFoundError where it has not run."""
    file = folder / f"{stage}_state.pt"
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no {file.name}: run the stage {stage} first")
    return torch.load(file, weights_only=True)


def log(file: Path, step: int, spent: float, recent: list[dict], scores: dict) -> None:
    """Print a line and add it to a file."""
    line = {"step": step, "seconds": round(spent)}
    if recent:
        means = {name: float(np.mean([r[name] for r in recent])) for name in recent[0]}
        line["loss"] = {name: round(value, 4) for name, value in means.items()}
    line["held_out"] = {name: round(value, 3) for name, value in scores.items()}
    write_line(line, file)


def tower(args: argparse.Namespace) -> None:
    """Stage 1."""
    words = {"output": args.state, "minutes": args.minutes or MINUTES["tower"]}
    run("playground.qwen_tower", words | {"threads": args.threads})


def places(args: argparse.Namespace) -> None:
    """Stage 2."""
    train(Places(args), args.state, args.minutes or MINUTES["places"], args.log_every)


def answers(args: argparse.Namespace) -> None:
    """Stage 3."""
    train(Answers(args), args.state, args.minutes or MINUTES["answers"], args.log_every)


def whole(args: argparse.Namespace) -> None:
    """Stage 4."""
    train(Whole(args), args.state, args.minutes or MINUTES["whole"], args.log_every)


def save(args: argparse.Namespace) -> None:
    """Write the checkpoint: of stage 4, or else of the tower and of stage 3."""
    stage = Answers(args)
    tower = TrainedTower()
    if (args.state / "whole_state.pt").exists():
        stage.trained.append(tower)
        stage.trained.load_state_dict(reached(args.state, "whole")["trained"])
    else:
        stage.trained.load_state_dict(reached(args.state, "answers")["trained"])
        tower.load_state_dict(reached(args.state, "tower")["model"])
    write(stage.decoder, tower.visual, args.output)


def write(decoder: QwenDecoder, visual: nn.Module, folder: Path) -> None:
    """Write the folder of a checkpoint, weights in bf16."""
    qwen_files.save(folder, visual.config.to_dict(), len(decoder.model.layers))
    state = decoder.state_dict()
    state |= {f"visual.{name}": value for name, value in visual.state_dict().items()}
    state = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def glimpse(args: argparse.Namespace) -> None:
    """A trained part of GlimpsePrune for the finished checkpoint, in the folder beside it."""
    stage = qwen_glimpse.Glimpse(args)
    train(stage, args.state, args.minutes or MINUTES["glimpse"], args.log_every)
    qwen_glimpse.save(stage, args.output, qwen_glimpse.part_folder(args.output))


def plus(args: argparse.Namespace) -> None:
    """The adapter of GlimpsePrune+ for the finished checkpoint, in the folder beside it."""
    output = args.state / "plus"
    words = {"model": args.output, "output": output}
    words["reduce-layer"] = qwen_glimpse.SHAPE.reduce_layer
    run("playground.train_plus", words)
    qwen_glimpse.publish_adapter(output / "run", args.output)


def glimpse_plus(args: argparse.Namespace) -> None:
    """A trained part of GlimpsePrune for the checkpoint with that adapter."""
    stage = qwen_glimpse.GlimpsePlus(args)
    train(stage, args.state, args.minutes or MINUTES["glimpse_plus"], args.log_every)
    adapter = qwen_glimpse.plus_folder(args.output)
    qwen_glimpse.save(stage, adapter, qwen_glimpse.part_folder(adapter))


STAGES = {f.__name__: f for f in (tower, places, answers, whole, save, glimpse, plus, glimpse_plus)}


def main() -> None:
    """Run one stage or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("all", *STAGES))
    parser.add_argument("--state", type=Path, default=STATE, help="folder of the training states")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, help="time budget, earlier runs count")
    parser.add_argument("--pictures", type=int, default=2000, help="training scenes of stage 2, 3")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for name in STAGES if args.stage == "all" else [args.stage]:
        STAGES[name](args)


if __name__ == "__main__":
    main()
