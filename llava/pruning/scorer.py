"""A scorer on disk: a small trained network that says how important a visual token is.

It is a stack of linear layers in a safetensors file, under the names that `nn.Sequential` gives:
`0.weight`, `0.bias`, `2.weight`, ... Where a number is left out between two layers, an activation
stands. The metadata of the file may name it, `activation` ("gelu" otherwise), and one behind the
last layer, `output_activation`. Published scorers of other shapes have to be converted.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weight_files import check_numbers, local_folder, metadata_in
from .learned import WEIGHTS_FILE, build_part, part_files, read_part, read_part_config

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
#: entries of the metadata of a file
BETWEEN, BEHIND = "activation", "output_activation"
NAME = re.compile(r"(0|[1-9]\d{0,3})\.(weight|bias)")
LAYOUT = "a stack of linear layers (0.weight, 0.bias, 2.weight, ...)"


class ExactLinear(nn.Linear):
    """A linear layer that computes in fp32, whatever its weights are in."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


class Scorer(nn.Sequential):
    """Tokens (..., width) to importances (...), in fp32."""

    @property
    def width(self) -> int:
        first: Any = self[0]
        return int(first.in_features)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = super().forward(tokens)
        return scores[..., 0]


def scorer_file(given: str, method: str) -> str:
    """The file that `given` means: itself, or `model.safetensors` in a folder or hub repository.

    method: whose part it is to be
    Raises FileNotFoundError where there is none, ValueError where it is of another kind.
    """
    path = given
    if not os.path.isfile(given):
        folder = local_folder(given)
        read_part_config(folder, method)  # it may be somebody else's
        found = part_files(folder)
        if len(found) != 1:
            raise FileNotFoundError(f"{folder} holds no scorer (looked for {WEIGHTS_FILE})")
        (path,) = found
    if not path.endswith(".safetensors"):
        raise ValueError(f"{path} is no scorer: expected a .safetensors file with {LAYOUT}")
    return path


def read_scorer(given: str, method: str, width: int) -> Scorer:
    """The scorer of tokens `width` wide in a file, see `scorer_file`, frozen, on the CPU.

    Raises ValueError where it is none, or does not fit.
    """
    path = scorer_file(given, method)
    folder, name = os.path.split(path)
    tensors = read_part(folder, [name])[1]
    for name, tensor in tensors.items():
        check_numbers(name, tensor, path)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
    layers, metadata = linear_layers(tensors, path), metadata_in(path)
    check_sizes(layers, width, path)
    between = activation(metadata.get(BETWEEN, "gelu"), BETWEEN, path)
    behind = activation(metadata.get(BEHIND, "none"), BEHIND, path)
    like = torch.empty(0, dtype=torch.float32)
    return build_part(lambda: stack(layers, between, behind), tensors, path, like)


def linear_layers(tensors: dict[str, Tensor], path: str) -> dict[int, tuple[int, int, bool]]:
    """Number -> (inputs, outputs, whether it has a bias) of the layers, in their order."""
    for name in tensors:
        if not NAME.fullmatch(name) or f"{name.partition('.')[0]}.weight" not in tensors:
            raise ValueError(
                f"{path} is no scorer: it holds {name}, expected {LAYOUT}; one of another layout "
                "has to be converted"
            )
    layers = {}
    for number in sorted({int(name.partition(".")[0]) for name in tensors}):
        weight, bias = tensors[f"{number}.weight"], tensors.get(f"{number}.bias")
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(
                f"{path} is no scorer: {number}.weight has shape {tuple(weight.shape)}, expected "
                "(outputs, inputs) of a linear layer"
            )
        layers[number] = weight.shape[1], weight.shape[0], bias is not None
    if not layers:
        raise ValueError(f"{path} is no scorer: it is empty, expected {LAYOUT}")
    return layers


def check_sizes(layers: dict[int, tuple[int, int, bool]], width: int, path: str) -> None:
    """Raises ValueError unless the layers make one number of a token."""
    numbers = list(layers)
    first, last = layers[numbers[0]], layers[numbers[-1]]
    if first[0] != width:
        raise ValueError(
            f"{path} scores tokens of width {first[0]}, but behind the projector of this model "
            f"they have width {width}: a scorer fits the model it was trained on"
        )
    for before, after in pairwise(numbers):
        if layers[before][1] != layers[after][0]:
            raise ValueError(
                f"{path} is no scorer: layer {before} gives {layers[before][1]} numbers, layer "
                f"{after} takes {layers[after][0]}"
            )
    if last[1] != 1:
        raise ValueError(
            f"{path} is no scorer: its last layer gives {last[1]} numbers for a token, expected "
            "one, its importance"
        )


def activation(name: str, key: str, path: str) -> Callable[[], nn.Module]:
    """What makes the activation `name`. Raises ValueError where that is not known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{path}: unknown {key} {name!r}, choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def stack(
    layers: dict[int, tuple[int, int, bool]],
    between: Callable[[], nn.Module],
    behind: Callable[[], nn.Module],
) -> Scorer:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs, bias) in layers.items():
        if parts and str(number - 1) not in parts:
            parts[str(number - 1)] = between()
        parts[str(number)] = ExactLinear(inputs, outputs, bias)
    parts[str(max(layers) + 1)] = behind()
    return Scorer(parts)
