"""Methods, options, budgets and prompts drawn at random: a batch says what its rows say alone, a
schedule what happens, and questions that share images get the answers they get alone.

More seeds find what these do not: 13 of the first 700 failed before what they found was mended.
"""

import random

import pytest
import torch

from llava.model.inputs import Picture
from llava.model.reuse import PrefixCache
from llava.pruning import METHODS, build_pruner
from llava.pruning.base import option_names
from llava.pruning.testing import tiny
from llava.pruning.testing.promises import GREEDY, generate

#: those that found something, and a few
SEEDS = (159, 176, 302, 353, 406, 424, 427, 451, 470, 514, 624, 639, 673, *range(10))
SHORT = {**GREEDY, "max_new_tokens": 2}
#: of how many tokens these leave, two in a row promise the most alone, and the second may leave
#: fewer of those than of fewer
UNSURE = ("prumerge+", "downsample+")
#: values, most of them at the edge of what is allowed, of options that methods may have
VALUES = {
    "alpha": (0.0, 1.0),
    "average": (True,),
    "beta": (0.0, 2.0),
    "combine": ("add",),
    "drop_per_round": (1, 1000),
    "gamma": (0.0, 1.0),
    "important_ratio": (0.0, 1.0),
    "key_states": ("input",),
    "layer": (1, 3),
    "mmr_lambda": (0.0, 1.0),
    "neighbors": (0, 100),
    "num_runs": (1, 100),
    "picks_per_round": (1,),
    "pillar_mode": ("l2norm", "none"),
    "pivot_text_token": (0, 100),
    "plus": (True,),
    "pruned_size": ("uniform",),
    "raters": ("all", "last"),
    "region": (False,),
    "rule": ("released",),
    "sink_ratio": (0.01, 0.5),
    "spatial_threshold": (0.0,),
    "stage2": ("off", "random"),
    "text_pruner": (False,),
    "theta": (0.0, 0.5),
    "twig_K": (0, 2),
    "version": ("1.0", "2.0"),
    "window": (2, 7),
}


def draw_options(draw: random.Random, name: str, prefix: str = "", budget: bool = True) -> dict:
    """Some options of the method called `name`, and a budget if it takes one."""
    known = option_names(METHODS[name])
    found = {k: draw.choice(v) for k, v in VALUES.items() if k in known and draw.random() < 0.2}
    if budget and "visual_token_ratio" in known and draw.random() < 0.3:
        found["visual_token_ratio"] = draw.choice([1e-9, 0.222, 0.41, 1.0])
    elif budget and "visual_token_num" in known and name != "mustdrop":
        found["visual_token_num"] = draw.choice([1, 2, 7, 19, 23, 35, 36])
    return {prefix + key: value for key, value in found.items()}


def draw_method(draw: random.Random):
    """A method, two in a row, or one in a wrapper. Raises ValueError where they do not fit."""
    single = [name for name, method in METHODS.own.items() if not method.wraps]
    kind, first, second = draw.random(), draw.choice(single), draw.choice(single)
    if kind < 0.6:
        name, options = first, draw_options(draw, first)
    elif kind < 0.8:
        name = f"{first}+{second}"
        options = draw_options(draw, first, f"{first}_") | draw_options(draw, second, f"{second}_")
    else:
        name, options = f"restore+{first}", draw_options(draw, "restore")
        options |= draw_options(draw, first, f"{first}_", budget=False)
    return tiny.with_random_parts(build_pruner(name, **options))


def draw_prompt(draw: random.Random, own_grids: bool):
    """(ids (1, L), images) with up to two images anywhere."""
    pieces = [draw.choice([0, 1, 5, 12])]
    for _ in range(draw.choice([0, 1, 1, 1, 2])):
        pieces += ["image", draw.choice([0, 0, 1, 4, 9])]
    prompt = tiny.sample(*pieces, seed=draw.randrange(1000))
    if not own_grids:
        return prompt.ids, list(() if prompt.images is None else prompt.images)
    shown = []
    for _ in range(pieces.count("image")):
        grid, seed = (draw.randint(1, 8), draw.randint(1, 8)), draw.randrange(100)
        film = tiny.video(draw.choice([2, 3]), *grid, seed=seed)
        shown.append(film if draw.random() < 0.2 else tiny.picture(*grid, seed))
    return prompt.ids, shown


def stacked(images: list, own_grids: bool):
    return (images if own_grids else torch.stack(images)) if images else None


@pytest.fixture(params=["llava", "own_grids"])
def case(request, shared_model, shared_own_grids_model):
    own_grids = request.param == "own_grids"
    return (shared_own_grids_model if own_grids else shared_model), own_grids


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_is_drawn_keeps_its_promises(case, seed):
    (model, own_grids), draw = case, random.Random(seed)
    model.pruner = build_pruner("none")
    rows = [draw_prompt(draw, own_grids) for _ in range(draw.choice([2, 2, 3]))]
    dense = [None if shown else generate(model, ids, None, **SHORT) for ids, shown in rows]
    try:
        pruner = draw_method(draw)
        model.pruner = pruner
        alone = [generate(model, ids, stacked(own, own_grids), **SHORT) for ids, own in rows]
    except ValueError as refusal:
        pytest.skip(str(refusal))
    ids, mask = tiny.pad_batch([ids for ids, _ in rows], draw.choice(["left", "right"]))
    together = stacked([image for _, own in rows for image in own], own_grids)
    tokens, logits, trace = generate(model, ids, together, attention_mask=mask, **SHORT)
    places = [own.tolist() for *_, row in alone for own in row.visual_positions]
    assert [own.tolist() for own in trace.visual_positions] == places
    for row, (own_tokens, own_logits, own_trace) in enumerate(alone):
        torch.testing.assert_close(logits[row], own_logits[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(tokens[row], own_tokens[0])
        assert [int(n[row]) for n in trace.kv_lengths] == [int(n[0]) for n in own_trace.kv_lengths]
        if (plain := dense[row]) is not None:
            assert torch.equal(own_logits, plain[1])
        elif len(rows[row][1]) == 1 and not pruner.name.startswith(UNSURE):
            check_schedule(model, own_trace, rows[row][1][0], own_grids)
    check_shared(model, [row for row in rows if row[1]], own_grids)


def check_schedule(model, trace, image, own_grids: bool) -> None:
    """No more tokens than promised enter the layers for the one image of a prompt."""
    pruner, parts = model.pruner, len(image) if len(image.shape) == 5 else 1
    if parts > 1 and not getattr(pruner, "prune_videos", True):
        return  # it leaves videos whole
    count = tiny.NUM_PATCHES if not own_grids else trace.unpruned_lengths[0] // parts
    pruner = pruner.with_budget_of(count * parts, parts)
    plan = pruner.token_schedule(count, len(trace.visual_tokens), parts)
    assert all(int(n) <= most for n, most in zip(trace.visual_tokens, plan, strict=True))


def check_shared(model, rows: list, own_grids: bool) -> None:
    """Prompts in two batches, which share their images, are answered as each is alone."""
    cache, question = PrefixCache(model), "What is it?"
    pictures = [[Picture(image, (1, 1)) for image in own] for _, own in rows]
    for batch in range(2 if rows else 0):
        tail = torch.arange(5, 6 + batch)
        prompts = [torch.cat([ids[0], tail]) for ids, _ in rows]
        options = dict(SHORT, pad_token_id=0)
        found = cache.generate(prompts, pictures, [question] * len(rows), **options)
        for answer, ids, (_, own) in zip(found, prompts, rows, strict=True):
            given = dict(images=stacked(own, own_grids), questions=[question] * len(own))
            assert torch.equal(answer, model.generate(ids[None], **given, **options)[0])
