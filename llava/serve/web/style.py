"""Look of the page: system fonts, a calm theme, and the panel of figures and pictures."""

from __future__ import annotations

import gradio as gr

MAX_STAGES = 64  # pictures of one answer that can be switched between


def theme() -> gr.themes.Base:
    """Fonts of the reader's own system: nothing is loaded from elsewhere."""
    return gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


_PANEL = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.5rem; margin: 0 0 .1rem; }
#title p { margin: 0; color: var(--body-text-color-subdued); }
.pv-buttons { gap: .4rem !important; flex-wrap: wrap !important; }
.pv-buttons button { flex: 1 1 84px; white-space: nowrap; }
.pv-ask { align-items: stretch; gap: .5rem !important; flex-wrap: nowrap !important; }
.pv-note { padding: .4rem .9rem .6rem; background: var(--block-background-fill); }
.pv-empty { color: var(--body-text-color-subdued); padding: .8rem 1rem; margin: 0;
  border: 1px dashed var(--border-color-primary); border-radius: 8px; }
.pv { display: flex; flex-direction: column; gap: .7rem; }
.pv-cards { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .5rem; }
.pv-card, .pv-layers, .pv-views, .pv-answer { border: 1px solid var(--border-color-primary);
  border-radius: 8px; padding: .55rem .7rem; background: var(--block-background-fill); }
.pv-title { font-size: .75rem; color: var(--body-text-color-subdued); }
.pv-value { font-size: 1.25rem; font-weight: 650; white-space: nowrap; }
.pv .pv-change { display: block; font-weight: 650; color: #4f46e5; }
.dark .pv .pv-change { color: #a5b4fc; }
.pv-dense { font-size: .75rem; color: var(--body-text-color-subdued); margin: .15rem 0 0; }
.pv-bars { display: flex; align-items: flex-end; gap: 3px; height: 64px; margin-top: .4rem; }
.pv-bar { flex: 1; height: 100%; display: flex; align-items: flex-end; border-radius: 3px;
  background: color-mix(in srgb, var(--body-text-color) 8%, transparent); }
.pv-bar i { display: block; width: 100%; min-height: 2px; background: #6366f1;
  border-radius: 3px; }
.pv-axis span { color: var(--body-text-color-subdued) !important; }
.pv-axis { display: flex; justify-content: space-between; font-size: .7rem; }
.pv-views > input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.pv-views > label { display: inline-block; font-size: .8rem; padding: .25rem .6rem; cursor: pointer;
  border: 1px solid var(--border-color-primary); border-radius: 999px; margin: 0 .3rem .4rem 0; }
.pv-views > input:checked + label { background: #4f46e5; border-color: #4f46e5; color: white; }
.pv-views > input:focus-visible + label { outline: 2px solid #6366f1; outline-offset: 2px; }
.pv-pane { display: none; }
.pv-pane img { width: 100%; max-width: 420px; border-radius: 6px; display: block;
  margin: 0 auto .3rem; }
.pv-answer { font-size: 1rem; margin-bottom: .7rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
#chatbot img { max-width: 220px; border-radius: 8px; margin: 0; }
#insight, #left-panel, #right-panel { min-height: 0; padding: 0 !important; overflow: visible; }
#insight > *, #left-panel > *, #right-panel > * { padding: 0 !important; }
#examples .gallery { gap: .4rem; }
#examples .gallery-item, #examples .container { width: 62px !important; height: 62px !important; }
#examples img { width: 62px; height: 62px; object-fit: cover; }
#chatbot { height: clamp(300px, calc(100vh - 350px), 640px) !important; }
.pv-method { font-weight: 650; margin-bottom: .25rem; }
@media (max-width: 640px) {
  .gradio-container main, .gradio-container .main { padding: .6rem !important; }
  #title h1 { font-size: 1.2rem; }
  .pv-value { font-size: 1rem; }
  .pv-card { padding: .45rem .5rem; }
  #image { height: 230px !important; }
  #chatbot { height: 380px !important; }
}
"""


def css() -> str:
    """The style sheet; the n-th radio button of a panel shows its n-th picture."""
    shown = ",\n".join(
        f".pv-views > input:nth-of-type({n}):checked ~ .pv-panes > .pv-pane:nth-child({n})"
        for n in range(1, MAX_STAGES + 1)
    )
    return f"{_PANEL}{shown} {{ display: block; }}\n"
