"""Trees of guesses by themselves: how they grow, and the way of a decoder through them."""

import itertools

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from llava.model.token_choice import Noise, TokenChoice
from llava.model.token_tree import Growth, TokenTree, on_host

VOCABULARY = 5


def logits_behind(path: tuple[int, ...]) -> torch.Tensor:
    """(V,) of a made-up drafter, the same for the same path."""
    seed = sum((token + 2) * 97**place for place, token in enumerate(path)) % 2**32
    return 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def grown_tree(depth: int, width: int, most: int, drafter=logits_behind) -> TokenTree:
    growth, rows = Growth(width, torch.zeros(1)), {}
    growth.add(drafter(())[None])
    paths: list[tuple[int, ...]] = []  # of all nodes that were followed
    for _ in range(depth - 1):
        tokens, visible = growth.follow(), growth.visible
        assert len(growth.depths) == visible.shape[1]
        assert visible.shape == (len(tokens), len(paths) + len(tokens))
        start = len(paths)
        for number, token in enumerate(tokens.tolist()):
            seen = [place for place in visible[number].nonzero()[:, 0].tolist() if place < start]
            path = tuple(rows[place] for place in seen) + (token,)
            rows[start + number] = token
            paths.append(path)
        growth.add(torch.stack([drafter(path) for path in paths[start:]]))
    return growth.tree(most)


def paths_of(tree: TokenTree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 7, 30])
def test_a_wide_tree_holds_the_most_probable_paths(depth, most):
    """With a width that leaves nothing out: compared with all paths there are."""
    scores = {}
    for length in range(1, depth + 1):
        for path in itertools.product(range(VOCABULARY), repeat=length):
            before = scores.get(path[:-1], 0.0)
            scores[path] = before + float(logits_behind(path[:-1]).log_softmax(0)[path[-1]])
    tree = grown_tree(depth, VOCABULARY**depth, most)
    found = dict(zip(paths_of(tree), tree.scores.tolist(), strict=True))
    best = sorted(scores, key=scores.get, reverse=True)[:most]
    assert set(found) == set(best) and len(tree) == min(most, len(scores))
    for path, score in found.items():
        assert score == pytest.approx(scores[path], abs=1e-5)


@pytest.mark.parametrize(("depth", "width", "most"), [(1, 1, 1), (3, 1, 9), (4, 2, 60), (4, 3, 10)])
def test_nodes_stand_behind_those_above_them_and_siblings_differ(depth, width, most):
    tree = grown_tree(depth, width, most)
    assert len(tree) == min(most, width + (depth - 1) * width * width)
    parents, depths = tree.parents.tolist(), tree.depths.tolist()
    assert depths == sorted(depths) and max(depths) <= depth == tree.deepest
    for node, parent in enumerate(parents, start=1):
        assert parent < node and depths[node - 1] == (depths[parent - 1] if parent else 0) + 1
    paths = paths_of(tree)
    assert len(set(paths)) == len(paths)


def test_of_equal_scores_the_older_one_stays_so_that_no_node_is_without_its_parent():
    """A drafter that is as good as sure: followers cost nothing, and all scores are equal."""

    def sure(path):
        logits = torch.full((VOCABULARY,), -200.0)
        logits[len(path) % VOCABULARY] = 0
        return logits

    for most in range(1, 12):
        tree = grown_tree(4, 3, most, sure)
        for node, parent in enumerate(tree.parents.tolist(), start=1):
            assert parent < node
        chain = min(most, 4)
        assert (tree.scores[:chain] == 0).sum() >= 1
        assert {(0, 1, 2, 3)[:length] for length in range(1, chain + 1)} <= set(paths_of(tree))


def test_a_node_sees_its_ancestors_and_itself():
    tree = grown_tree(4, 3, 40)
    parents = [0, *tree.parents.tolist()]
    for node in range(len(tree) + 1):
        above, at = {0, node}, node
        while at:
            at = parents[at]
            above.add(at)
        assert set(tree.lineage[node].nonzero()[:, 0].tolist()) == above


# --- the way through ------------------------------------------------------------------------


def choice(warpers=None, rules=()):
    return TokenChoice(LogitsProcessorList(rules), warpers, torch.ones(1, 1, dtype=torch.long), [])


def target(path: tuple[int, ...]) -> torch.Tensor:
    """(V,) of a made-up decoder that often agrees with the drafter."""
    return logits_behind(path) + 0.7 * logits_behind((*path, 0, 0, 0))


def verified(tree: TokenTree) -> torch.Tensor:
    return torch.stack([target(path) for path in [(), *paths_of(tree)]])


def test_the_way_is_the_greedy_one_and_ends_where_no_guess_follows():
    depths = set()
    for most in (1, 4, 12, 40):
        tree = grown_tree(4, 3, most)
        walk = choice().walk(verified(tree), tree)
        tokens, path = [], ()
        while True:
            tokens.append(int(target(path).argmax()))
            path = (*path, tokens[-1])
            if path not in paths_of(tree):
                break
        assert walk.numbers == tokens == walk.tokens.tolist()
        assert [paths_of(tree)[node - 1] for node in walk.accepted] == [
            path[: length + 1] for length in range(len(tokens) - 1)
        ]
        assert walk.nodes.tolist() == [0, *walk.accepted]
        assert torch.equal(walk.scores.argmax(dim=-1), walk.tokens)
        depths.add(len(tokens))
    assert len(depths) > 1


def test_rules_see_the_answer_with_the_way_so_far():
    """The way of rules, without any that matters, is that of one comparison; one about repeated
    tokens looks at those on the way."""
    tree = grown_tree(4, 3, 40)
    idle = [RepetitionPenaltyLogitsProcessor(1.0)]
    plain, ruled = (choice(rules=own).walk(verified(tree), tree) for own in ((), idle))
    assert plain.numbers == ruled.numbers and plain.accepted == ruled.accepted
    assert torch.equal(plain.scores, ruled.scores) and plain.nodes.equal(ruled.nodes)
    seen = []

    def watch(ids, scores):
        seen.append(ids[0].tolist())
        return scores

    walk = choice(rules=[watch]).walk(verified(tree), tree)
    wanted = [[1, *walk.numbers[:length]] for length in range(len(walk.numbers))]
    assert seen == wanted


def test_drawn_tokens_are_those_of_sampling_one_by_one():
    """After the same seed, over several steps, with noise that waits for the next one."""
    for seed in range(20):
        torch.manual_seed(seed)
        wanted, path = [], ()
        for _ in range(8):
            p = target(path)[None].softmax(dim=-1)
            path = (*path, int(torch.multinomial(p, 1)))
        wanted, path = list(path), ()
        torch.manual_seed(seed)
        own = choice(warpers=LogitsProcessorList())
        while len(path) < len(wanted):
            tree = grown_tree(3, 3, 12, lambda more, path=path: logits_behind((*path, *more)))
            logits = torch.stack([target((*path, *more)) for more in [(), *paths_of(tree)]])
            path = (*path, *own.walk(logits, tree).numbers)
        assert list(path[: len(wanted)]) == wanted


def test_drawn_tokens_have_the_decoders_distribution():
    torch.manual_seed(0)
    tree, own = grown_tree(2, 2, 4), choice(warpers=LogitsProcessorList())
    logits, rounds = verified(tree), 3000
    firsts, accepted = torch.zeros(VOCABULARY), 0
    for _ in range(rounds):
        walk = own.walk(logits, tree)
        firsts[walk.numbers[0]] += 1
        accepted += bool(walk.accepted)
        own.noise = Noise()
    p = target(()).softmax(dim=0)
    assert (firsts / rounds - p).abs().max() < 0.03
    guessed = p[tree.tokens[tree.depths == 1]].sum()  # no rule can accept more often
    assert abs(accepted / rounds - guessed) < 0.03


def test_trees_come_to_the_host_as_they_are():
    trees = [grown_tree(3, 2, most) for most in (3, 8)]
    for tree, copy in zip(trees, on_host(trees), strict=True):
        for name in ("tokens", "parents", "depths", "scores"):
            assert torch.equal(getattr(tree, name), getattr(copy, name))
        assert copy.deepest == tree.deepest
    assert on_host([]) == []
