"""A model for VLMEvalKit: LLaVA or Qwen2.5-VL with any pruning method.

    # run_pruned.py, beside VLMEvalKit's run.py
    from llava.eval.plugins.vlmeval import register
    register("llava_v1.5_7b_vispruner64", "liuhaotian/llava-v1.5-7b", "vispruner", 64)
    from run import load_env, main
    load_env(); main()

    python run_pruned.py --model llava_v1.5_7b_vispruner64 --data POPE

See docs/Comparing.md.
"""

from __future__ import annotations

from functools import partial

from PIL import Image

from llava.eval.plugins.model import ask, open_loop, read_pruner

try:
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel
except ImportError as error:
    raise ImportError(
        "llava.eval.plugins.vlmeval belongs to VLMEvalKit, which is not installed here: install it "
        "into this environment, or start from the folder of its run.py"
    ) from error


class LlavaPruning(BaseModel):
    """
    model_path:       checkpoint; None: the playground's
    method:           pruning method, or two as METHOD+METHOD; None: what the options belong to
    visual_token_num: its budget; None: the method's own
    pruning_args:     its other options, KEY=VALUE with semicolons between them
    max_new_tokens:   length at which an answer is cut
    options:          further ones of `llava.eval.plugins.model.open_loop`, such as max_pixels
    """

    INTERLEAVE = True

    def __init__(
        self,
        model_path: str | None = None,
        method: str | None = None,
        visual_token_num: int | None = None,
        pruning_args: str = "",
        max_new_tokens: int = 512,
        **options,
    ):
        super().__init__()
        self.max_new_tokens = max_new_tokens
        pruner = read_pruner(method, visual_token_num, pruning_args)
        self.loop = open_loop(model_path, pruner=pruner, **options)

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """The answer to texts and images in the order of the message."""
        text, images = [], []
        for part in message:
            if part["type"] == "image":
                text.append("<image>")
                images.append(Image.open(part["value"]))
            else:
                text.append(part["value"])
        return ask(self.loop, [("\n".join(text), images)], self.max_new_tokens)[0]


def register(
    name: str,
    model_path: str | None = None,
    method: str | None = None,
    visual_token_num: int | None = None,
    **options,
) -> None:
    """Adds a setting to the models VLMEvalKit knows by name."""
    supported_VLM[name] = partial(LlavaPruning, model_path, method, visual_token_num, **options)
