"""Model, image, examples and parameters: the left column, shared by all tabs."""

from __future__ import annotations

import gradio as gr

from .asking import Settings
from .examples import example_list, examples
from .templates import AUTOMATIC, choices

MODES = ["Crop", "Resize", "Pad", "Default"]


class Controls:
    """The shared components; call inside the layout."""

    def __init__(self, models: list[str]):
        self.model = gr.Dropdown(
            models,
            value=models[0] if models else None,
            label="Model",
            interactive=True,
            elem_id="model",
            allow_custom_value=False,
        )
        self.image = gr.Image(
            type="pil",
            image_mode=None,  # as it was stored: gradio's way to RGB loses transparency and depth
            format="png",
            label="Image",
            sources=["upload", "clipboard"],
            height=270,
            buttons=["fullscreen"],
            elem_id="image",
        )
        self.samples = examples()
        self.examples = example_list(self.samples)

    def parameters(self) -> None:
        """Adds the accordion of sampling parameters."""
        with gr.Accordion("Parameters", open=False, elem_id="parameters"):
            self.temperature = gr.Slider(0, 1, 0.2, step=0.1, label="Temperature")
            self.top_p = gr.Slider(0, 1, 0.7, step=0.1, label="Top P")
            self.max_tokens = gr.Slider(0, 1024, 512, step=64, label="Max output tokens")
            self.template = gr.Dropdown(choices(), value=AUTOMATIC, label="Prompt template")
            self.mode = gr.Radio(MODES, value="Default", label="Images that are not square")
            self.dense = gr.Checkbox(
                True, label="Also measure the prefill without pruning (asks the worker once more)"
            )

    @property
    def inputs(self) -> set:
        """Components that `settings` reads, and the image."""
        chosen = {self.model, self.image, self.temperature, self.top_p, self.max_tokens}
        return chosen | {self.template, self.mode, self.dense}

    def settings(
        self, values: dict, pruning: dict | None, conv_mode: str | None = None
    ) -> Settings:
        """What is chosen, with the "pruning" field of a request and the template that the worker
        says its model has."""
        return Settings(
            values[self.model] or "",
            values[self.template],
            values[self.mode],
            values[self.temperature],
            values[self.top_p],
            values[self.max_tokens],
            pruning,
            conv_mode,
        )


def question_box(name: str, placeholder: str) -> gr.Textbox:
    """Where a question is typed; name: its element id."""
    return gr.Textbox(
        label="Question about the image",
        show_label=False,
        placeholder=placeholder,
        scale=8,
        lines=1,
        max_lines=4,
        max_length=4000,
        elem_id=name,
        container=False,
        min_width=120,
    )
