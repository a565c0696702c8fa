"""What a method offers that guesses the next tokens; `llava.model.self_speculative` runs it.

Paper: Growing a Twig to Accelerate Large Vision-Language Models, https://arxiv.org/abs/2503.14075
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..devices import device_of

#: fields of `Drafter` that say how tokens are guessed: options of a method and of a `generate` call
DRAFTER_OPTIONS = (
    "num_speculations",
    "draft_stop_prob",
    "tree_depth",
    "tree_width",
    "tree_nodes",
)
#: nodes of a tree where nothing else is said: as published, and on a CPU, where every node that is
#: verified costs arithmetic; an accelerator waits for the weights, whatever it multiplies with them
TREE_NODES, TREE_NODES_ON_CPU = 60, 8
#: width of a tree, as published, if it has enough nodes for it
TREE_WIDTH = 10


@dataclass
class Drafter:
    """Layers, norm and head that continue the first `shared_layers` layers of a decoder.

    shared_layers:    decoder layers that drafter and decoder have in common
    layers:           decoder layers whose `layer_idx` follows those of the decoder, so that one
                      cache serves both
    head:             (B, S, D) after `norm` -> logits
    num_speculations: most tokens guessed in a row
    draft_stop_prob:  a guess with a smaller probability is the last one of its step

    It guesses a chain of tokens, or, with `tree_nodes`, a tree of them, of which a step may accept
    any path; `num_speculations` and `draft_stop_prob` are then not read:

    tree_nodes: guesses of a step that are verified, the most probable ones; 0: a chain; None: as
                many as suit the device (`TREE_NODES`, `TREE_NODES_ON_CPU`)
    tree_depth: tokens of the longest path
    tree_width: followers of a guess that are considered, and guesses of each depth that get any;
                None: the nodes that there are for each depth, rounded up, at most `TREE_WIDTH`
    """

    shared_layers: int
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    num_speculations: int = 5
    draft_stop_prob: float = 0.6
    tree_depth: int = 4
    tree_width: int | None = None
    tree_nodes: int | None = 0

    def __post_init__(self):
        least = {"num_speculations": 0, "tree_depth": 1, "tree_width": 1, "tree_nodes": 0}
        for name, fewest in least.items():
            number = getattr(self, name)
            if number is None and name in ("tree_width", "tree_nodes"):
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < fewest:
                raise ValueError(f"{name} ({number!r}) must be a whole number from {fewest} on")
        if not 0 <= self.draft_stop_prob <= 1:
            raise ValueError(f"draft_stop_prob ({self.draft_stop_prob!r}) must lie between 0 and 1")

    @property
    def guesses_trees(self) -> bool:
        return self.tree_nodes != 0

    @property
    def nodes(self) -> int:
        """Guesses of a step, where these are trees."""
        if self.tree_nodes is not None:
            return self.tree_nodes
        return TREE_NODES_ON_CPU if device_of(self.head).type == "cpu" else TREE_NODES

    @property
    def width(self) -> int:
        """Followers of a guess, where guesses are trees."""
        if self.tree_width is not None:
            return self.tree_width
        return min(TREE_WIDTH, -(-self.nodes // self.tree_depth))

    def logits(self, x: Tensor) -> Tensor:
        """fp32 logits (B, S, V) from the output (B, S, D) of the last of `layers`."""
        return self.head(self.norm(x)).float()
