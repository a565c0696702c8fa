"""Self-speculative generation with trees: a step may accept any path through the guesses.

The drafter grows a tree level by level, the most probable followers of the most probable nodes
(`llava.model.token_tree`), and one run of the decoder verifies all of it: every node sees the text
before the tree and its own ancestors. The path that the decoder itself takes is kept in the caches.

Paper: Growing a Multi-head Twig to Accelerate Large Vision-Language Models, 2503.14075, version 3
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pruning.branches import Branches
from ..pruning.prefill import Prefill
from ..pruning.required import required
from .lockstep import Layers, Tokens, Work, alone
from .self_speculative import NO_TOKEN, Speculation, SpeculationLog
from .token_choice import Walk
from .token_tree import Growth, TokenTree, on_host


class TreeSpeculation(Speculation):
    """As `Speculation`, for a drafter that guesses trees.

    The prompt and the newest token run through the shared layers once, for drafter and decoder. So
    would the nodes that were followed while the tree grew, but others are kept as well, and a pass
    of the shared layers over all nodes takes no longer than one over the others.
    """

    @property
    def spare(self) -> int:
        followed = self.drafter.width * (self.drafter.tree_depth - 1)
        return max(followed, self.drafter.nodes) + 1

    # --- guessing -----------------------------------------------------------------------------

    def guess_first(self, prefill: Prefill) -> tuple[TokenTree, Tensor, Branches]:
        return alone(self._guess_nodes(self._first_logits(prefill)))

    def step(self) -> tuple[Tensor, list[int]]:
        return alone(self.steps())

    def steps(self) -> Work[tuple[Tensor, list[int]]]:
        """`step`, for several prompts at once (`together`), of which each has its own tree, accepts
        its own path, and has caches as long as its own text."""
        newest = required(self.newest, NO_TOKEN)
        root = yield self._through(self.shared, self._embedded(newest[0]))
        self.waiting.append(root)
        logits = yield from self._draft()
        tree, nodes, branches = yield from self._guess_nodes(logits)
        depths = torch.cat([tree.depths.new_zeros(1), tree.depths])
        branches = Branches(depths, tree.lineage, branches.root, tree.deepest)
        x = yield self._through(self.deep, torch.cat([root, nodes], dim=1), branches)
        logits = yield Tokens(self._decoder_logits, x)
        return (yield from self._verified(tree, logits[0]))

    def _guess_nodes(self, logits: Tensor) -> Work[tuple[TokenTree, Tensor, Branches]]:
        """The tree behind the newest token, from the logits (1, V) of the drafter there; its nodes
        (1, N, D) behind the shared layers, and how they stand behind their root."""
        tree = yield from self._grow(logits)
        branches = Branches(tree.depths, tree.lineage[1:, 1:], self.count - 1, tree.deepest)
        self.nodes = yield self._through(self.shared, self._embedded(tree.tokens), branches)
        return tree, self.nodes, branches

    def _grow(self, logits: Tensor) -> Work[TokenTree]:
        growth = Growth(self.drafter.width, logits)
        growth.add(logits)
        lengths = list(self.cache.lengths)
        for level in range(1, self.drafter.tree_depth):
            x = self._embedded(growth.follow())
            branches = Branches(growth.depths, growth.visible, self.count - 1, level)
            x = yield self._through([*self.shared, *self.drafter.layers], x, branches)
            logits = yield Tokens(self.drafter.logits, x)
            growth.add(self._at_home(logits[0]))
        for layer, length in enumerate(lengths):
            self.cache.crop(layer, length)
        return growth.tree(self.drafter.nodes)

    def _draft(self) -> Work[Tensor]:
        """(1, V) behind the newest token; the drafter's layers see what the last step accepted
        together with it."""
        x = torch.cat(self.waiting, dim=1)
        self.drafted, self.waiting = self.drafted + x.shape[1], []
        x = yield self._through(self.drafter.layers, x)
        logits = yield Tokens(self.drafter.logits, x[:, -1:].contiguous())
        return self._at_home(logits[:, -1])

    def _through(self, layers, x: Tensor, branches: Branches | None = None) -> Layers:
        return Layers(self.decoder.step, layers, x, self.cache, branches, self.of_several)

    def _embedded(self, tokens: Tensor) -> Tensor:
        """(1, n, D) of tokens (n,)."""
        return self.decoder.embed_tokens(tokens[None])

    def _decoder_logits(self, x: Tensor) -> Tensor:
        """(1, n, V) from what the last layer gives."""
        return self.model.logits_of(self.decoder.final_norm(x))

    # --- verification -------------------------------------------------------------------------

    def _verify(self, tree: TokenTree, logits: Tensor) -> tuple[Tensor, list[int]]:
        return alone(self._verified(tree, logits))

    def _verified(self, tree: TokenTree, logits: Tensor) -> Work[tuple[Tensor, list[int]]]:
        """Keeps the path that the decoder takes; logits (N + 1, V) behind the root and every node.

        Returns what `start` returns, without tokens beyond those that the answer may have.
        """
        left = self.most - self.count
        walk = yield from self.choice.walking(self._at_home(logits), tree, left)
        first = [length + self.count for length in self.prompt_lengths[: self.depth]]
        self.cache.keep_of_newest(first, [node - 1 for node in walk.accepted])
        if walk.accepted:
            accepted = walk.nodes[1:].to(self.nodes.device) - 1
            self.waiting.append(self.nodes.index_select(1, accepted))
        self.count += len(walk.numbers)
        self.newest = walk.tokens[-1:][None]
        self._record(tree, walk)
        self.choice.add(walk.tokens[:left])
        return walk.scores[:left], walk.numbers[:left]

    def _record(self, tree: TokenTree, walk: Walk) -> None:
        log = self.log
        log.trees.append(tree)
        log.paths.append(walk.accepted)
        log.accepted.append(len(walk.accepted))
        log.bonus.append(walk.numbers[-1])
        log.kv_lengths.append(list(self.cache.lengths))

    def finished_log(self) -> SpeculationLog:
        log = self.log
        log.trees = on_host(log.trees)
        log.drafts = [tree.tokens.tolist() for tree in log.trees]
        log.probabilities = [tree.scores.exp().tolist() for tree in log.trees]
        return log
