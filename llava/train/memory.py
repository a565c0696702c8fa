"""Memory that a recipe takes on each GPU, by formula: nothing is loaded.

    python -m llava.train.memory 13b                                  # every recipe, 8 GPUs
    python -m llava.train.memory qwen2.5-vl-7b
    python -m llava.train.memory CHECKPOINT --gpus 4 --batch 4 --length 2048

What is counted: weights, gradients, optimizer, and the activations of a step with gradient
checkpointing (without it for twigs, whose trunk keeps none, and a glimpse, in front of which
prompts leave keys and values alone). Not counted: the frozen tower at
work, CUDA itself (about 1 GB) and what the allocator loses to fragments; leave a tenth free.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields

from llava.model.language_model.qwen2_5_vl import Qwen2_5_VLConfig
from llava.model.multimodal_encoder.qwen2_5_vl_encoder import Qwen2_5_VLVisionConfig
from llava.program_parser import ProgramParser
from llava.train.twig_plus.policy import LOGITS_HELD

GB = 1e9
SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40},
}
QWEN_SIZES = {
    "qwen2.5-vl-3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "vocab_size": 151936,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-vl-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "vocab_size": 152064,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
#: parameters of the tower of LLaVA-1.5 and its width
TOWER_PARAMETERS, TOWER_WIDTH = 303_507_456, 1024
#: recipe -> (ZeRO stage of its script, what is trained, samples per GPU, tokens of the longest)
RECIPES = {
    "pretrain": (2, "projector", 32, 704),  # an image and a caption
    "finetune": (3, "all", 16, 2048),
    "finetune_lora": (3, "lora", 16, 2048),
    "train_twig": (2, "twig", 4, 2048),
    "train_twig++_stage1": (2, "gated twig", 4, 2048),
    "train_twig++_stage2": (2, "gates", 1, 2048),
    "train_glimpse": (0, "glimpse", 1, 704),
}
QWEN_RECIPES = {
    "finetune": (3, "all", 4, 4096),
    "finetune_lora": (3, "lora", 4, 4096),
    "train_glimpse": (0, "glimpse", 1, 4096),
}
#: what is trained on a trunk that keeps no activations and stays whole
BESIDE = ("twig", "gated twig", "gates", "glimpse")
#: selections of a sample that a pruning head learns from, which run side by side, and the tokens
#: of LLaVA-1.5's image that each of them leaves out at least
SELECTIONS, LEFT_OUT = 32, 576 - 227
#: widths and layers of a glimpse's predictor, and the tokens of an answer behind it
PREDICTOR, CONDITION, PREDICTOR_LAYERS, ANSWER = 256, 512, 4, 64


@dataclass
class Shape:
    """Sizes of a LLaVA model; parameters are counted without the tower's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int = 32000
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    mm_hidden_size: int = TOWER_WIDTH
    recipes = RECIPES
    lora_r = 128  # of the recipe

    @property
    def tower(self) -> int:
        """Parameters of the tower, without those of the projector."""
        return TOWER_PARAMETERS

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(in, out) of the seven matrices of a decoder layer."""
        width, inner = self.hidden_size, self.intermediate_size
        keys = width * (self.num_key_value_heads or self.num_attention_heads)
        keys //= self.num_attention_heads
        attention = [(width, width), (width, keys), (width, keys), (width, width)]
        return [*attention, (width, inner), (width, inner), (inner, width)]

    @property
    def layer(self) -> int:
        return sum(a * b for a, b in self.matrices) + 2 * self.hidden_size

    @property
    def head(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def projector(self) -> int:
        """A projector of two layers (mlp2x_gelu)."""
        return (self.mm_hidden_size + 1 + self.hidden_size + 1) * self.hidden_size

    @property
    def language_model(self) -> int:
        return self.num_hidden_layers * self.layer + 2 * self.head + self.hidden_size

    @property
    def glimpse(self) -> int:
        """The vectors of a glimpse token, and the predictor."""
        width, both, inner = PREDICTOR, PREDICTOR + CONDITION, 2 * PREDICTOR
        vectors = (self.num_hidden_layers + self.hidden_size + 2) * self.hidden_size
        attention = 2 * both * both + 2 * width * width
        mlp = 2 * (width + 1) * inner + (inner + 1) * width
        conditions = (self.mm_hidden_size + 1) * CONDITION
        layers = PREDICTOR_LAYERS * (attention + mlp + 2 * width + conditions)
        return vectors + (self.num_attention_heads + 1) * width + layers + width + 1

    @property
    def gates(self) -> int:
        """The two gates of a pruning head."""
        return 2 * self.hidden_size * self.hidden_size

    def lora(self, rank: int) -> int:
        return self.num_hidden_layers * rank * sum(a + b for a, b in self.matrices)


@dataclass
class QwenShape(Shape):
    """Sizes of a Qwen2.5-VL model, whose projector is the merger; vision_config: as in its file."""

    tie_word_embeddings: bool = False
    vision_config: dict = field(default_factory=dict)
    recipes = QWEN_RECIPES
    lora_r = 64

    def __post_init__(self):
        config = Qwen2_5_VLVisionConfig(**self.vision_config)
        self.mm_hidden_size, self.inner = config.hidden_size, config.intermediate_size
        self.depth, self.patch_values = config.depth, config.patch_values

    @property
    def layer(self) -> int:
        biases = self.matrices[:3]  # of queries, keys and values
        return super().layer + sum(out for _, out in biases)

    @property
    def projector(self) -> int:
        """The merger: a norm, and two layers on four patches side by side."""
        width, four = self.mm_hidden_size, 4 * self.mm_hidden_size
        return width + (four + 1) * four + (four + 1) * self.hidden_size

    @property
    def tower(self) -> int:
        width = self.mm_hidden_size
        attention = 4 * (width + 1) * width
        mlp = 2 * (width + 1) * self.inner + (self.inner + 1) * width
        return self.patch_values * width + self.depth * (attention + mlp + 2 * width)

    @property
    def language_model(self) -> int:
        return super().language_model - (self.head if self.tie_word_embeddings else 0)


@dataclass
class Memory:
    """GB on one GPU, and in the memory of the machine per GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    on_cpu: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate(
    shape: Shape,
    trained: str,
    zero: int,
    gpus: int = 8,
    batch: int = 16,
    length: int = 2048,
    lora_r: int = 128,
    twig_layers: int = 3,
    offload: bool = False,
    tower: int | None = None,
) -> Memory:
    """Memory of a step in bfloat16 with AdamW.

    trained: "projector", "all", "lora" or one of `BESIDE`; zero: 2 or 3 (DeepSpeed), 0: neither
    batch, length: samples per GPU and the tokens of each; offload: as scripts/zero3_offload.json
    tower:   parameters of the vision tower, which is frozen; None: those of the shape
    """
    tower = shape.tower if tower is None else tower
    if zero not in (0, 2, 3):
        raise ValueError(f"zero {zero} is not a stage of our scripts, choose 0, 2 or 3")
    learned = {
        "projector": shape.projector,
        "all": shape.language_model + shape.projector,
        "lora": shape.lora(lora_r) + shape.projector,
        "twig": (twig := twig_layers * shape.layer + shape.head + shape.hidden_size),
        "gated twig": twig + shape.gates,
        "gates": shape.gates,
        "glimpse": shape.glimpse,
    }
    if trained not in learned:
        raise ValueError(f"trained {trained!r} is unknown, choose from {', '.join(learned)}")
    count = learned[trained]
    frozen = tower + shape.language_model + shape.projector
    frozen -= 0 if trained in ("lora", *BESIDE) else count
    frozen += twig if trained == "gates" else 0
    shared = gpus if zero else 1
    if zero:  # bfloat16 weights and gradients; a float32 copy and two moments
        weights, gradients, optimizer = 2 * count, 2 * count / shared, 12 * count / shared
    else:  # float32 all of it
        weights, gradients, optimizer = 4 * count, 4 * count, 8 * count
    kept = 2 * frozen
    if zero == 3:
        weights /= shared
        if trained not in BESIDE:
            kept /= shared
    gathered = 2 * (2 * shape.layer + shape.head) if zero == 3 else 0  # whole while they are used
    on_cpu = weights + kept + optimizer if offload else 0
    on_gpu = 0 if offload else weights + kept
    return Memory(
        weights=(on_gpu + gathered) / GB,
        gradients=gradients / GB,
        optimizer=0.0 if offload else optimizer / GB,
        activations=activations(shape, trained, batch, length, twig_layers) / GB,
        on_cpu=on_cpu / GB,
    )


def activations(shape: Shape, trained: str, batch: int, length: int, twig_layers: int) -> float:
    """Bytes: the inputs of all layers, all that one layer keeps, and the logits of every token (an
    upper bound: they are made for supervised tokens alone)."""
    tokens = batch * length
    inside = 2 * tokens * (8 * shape.hidden_size + 3 * shape.intermediate_size)
    if trained == "glimpse":
        return inside + glimpse_activations(shape, batch, length)
    if trained == "gates":  # nothing is kept of a layer, and of logits a part at a time
        side_by_side = SELECTIONS * max(1, length - LEFT_OUT) / length
        return inside * side_by_side + LOGITS_HELD * (2 + 4 + 4)
    on_trunk = trained in ("twig", "gated twig")
    whole_layers = twig_layers if on_trunk else 1
    inputs = 0 if on_trunk else 2 * tokens * shape.hidden_size * shape.num_hidden_layers
    logits = tokens * shape.vocab_size * (2 + 4 + 4)  # bfloat16, float32 and the gradient
    if trained == "gated twig":  # both distributions, their logarithms, and the teacher's logits
        logits += tokens * shape.vocab_size * (2 + 4 * 4)
    return inputs + whole_layers * inside + logits


def glimpse_activations(shape: Shape, batch: int, length: int) -> float:
    """Bytes: keys and values of the prompts, all that the layers keep of the answers, their logits,
    and all that the predictor keeps, in float32."""
    tokens, answers = batch * length, batch * ANSWER
    cache = 2 * 2 * tokens * shape.num_hidden_layers * shape.matrices[1][1]
    layers = 2 * answers * (8 * shape.hidden_size + 3 * shape.intermediate_size)
    logits = answers * shape.vocab_size * (2 + 4 + 4)
    wide = PREDICTOR + CONDITION
    predictor = 4 * tokens * PREDICTOR_LAYERS * (10 * PREDICTOR + 7 * wide + CONDITION)
    return cache + shape.num_hidden_layers * layers + logits + predictor


def read_shape(model: str) -> Shape:
    """The shape of a model of `SIZES` or `QWEN_SIZES`, or of a checkpoint folder."""
    if model in QWEN_SIZES:
        return QwenShape(**QWEN_SIZES[model])
    if model in SIZES:
        return Shape(**SIZES[model], num_attention_heads=SIZES[model]["hidden_size"] // 128)
    path = os.path.join(model, "config.json")
    if not os.path.isfile(path):
        names = ", ".join([*SIZES, *QWEN_SIZES])
        raise ValueError(f"{model} is neither a folder with a config.json nor one of {names}")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    kind = Shape
    if config.get("model_type") == Qwen2_5_VLConfig.model_type:
        kind, config = QwenShape, config | config.get("text_config", {})
    known = {entry.name for entry in fields(kind)}
    return kind(**{key: value for key, value in config.items() if key in known})


def main(words=None) -> None:
    parser = ProgramParser(__doc__)
    names = ", ".join([*SIZES, *QWEN_SIZES])
    parser.add_argument("model", help=f"{names}, or a checkpoint folder")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that train together")
    parser.add_argument("--batch", type=int, help="samples per GPU (default: the recipe's)")
    parser.add_argument("--length", type=int, help="tokens of a sample (default: the recipe's)")
    args = parser.parse_args(words)
    try:
        shape = read_shape(args.model)
    except ValueError as error:
        parser.error(str(error))
    print(f"{'GB on each of ' + str(args.gpus) + ' GPUs':34} weights grads optim  acts total   CPU")
    for recipe, (zero, trained, batch, length) in shape.recipes.items():
        variants = [(zero, False)]
        variants += [(3, True)] if trained == "all" else []
        for stage, offload in variants:
            size, tokens = args.batch or batch, args.length or length
            lora = {"lora_r": shape.lora_r, "offload": offload}
            found = estimate(shape, trained, stage, args.gpus, size, tokens, **lora)
            how = f"ZeRO-{stage}, " if stage else ""
            label = f"{recipe} ({how}{'offload, ' if offload else ''}batch {size})"
            numbers = (found.weights, found.gradients, found.optimizer, found.activations)
            columns = "".join(f"{value:6.1f}" for value in (*numbers, found.total, found.on_cpu))
            print(f"{label:36}{columns}")


if __name__ == "__main__":
    main()
