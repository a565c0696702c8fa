"""Look of the page: system fonts, a calm theme, and the panel of figures and pictures."""

from __future__ import annotations

import gradio as gr

from .menu import headings

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
.pv-note { padding: .1rem .9rem .5rem !important; background: var(--block-background-fill); }
.pv-note p { font-size: .85rem !important; line-height: 1.4; margin: 0; }
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
.pv-views > label small { color: inherit; opacity: .75; }
.pv-pane { display: none; }
.pv-pane img { width: 100%; max-width: 420px; border-radius: 6px; display: block;
  margin: 0 auto .3rem; }
.pv-answer { font-size: 1rem; margin-bottom: .7rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
#chatbot img { max-width: 120px; border-radius: 8px; margin: 0; }
.pv-html { min-height: 0; padding: 0 !important; overflow: visible; }
.block.pv-html > .html-container { padding: 0 !important; }
.pv-examples { display: flex; flex-direction: column; gap: .4rem; margin-top: .3rem; }
.pv-examples button { display: flex; gap: .6rem; align-items: center; text-align: left; padding: 0;
  border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden;
  background: var(--block-background-fill); color: var(--body-text-color); font-weight: 400; }
.pv-examples button:hover, .pv-examples button:focus-visible { border-color: #6366f1; }
.pv-examples button:focus-visible { outline: 2px solid #6366f1; }
.pv-examples img { width: 66px; height: 66px; object-fit: cover; flex: none; margin: 0; }
.pv-examples span { font-size: .72rem; line-height: 1.3; padding-right: .4rem; }
input[role=listbox] { text-overflow: ellipsis; padding-right: 1.6rem !important; }
li[role=option] { display: block !important; line-height: 1.35; text-indent: -1.25rem;
  padding-left: 1.9rem !important; }
li[role=option]::before { display: block; font-size: .75rem; font-weight: 650;
  color: var(--body-text-color-subdued); padding: .3rem 0; }
.pv-takes { display: flex; flex-wrap: wrap; gap: .4rem; }
.pv-sweep + .pv-takes { margin-top: .6rem; }
.pv-takes .pv-take { font-size: .8rem; padding: .25rem .6rem; border-radius: 999px; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill);
  color: var(--body-text-color); text-decoration: none; font-weight: 400; }
.pv-takes .pv-take:hover, .pv-takes .pv-take:focus-visible { border-color: #6366f1; }
.pv-finding { margin: 0 0 .6rem; }
.pv-sweep { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(210px, 100%), 1fr)); }
.pv-sweep img { width: 100%; border-radius: 6px; margin: .4rem 0 0; }
.pv-sweep .pv-value span { font-size: .75rem; font-weight: 500; float: right; }
.pv-same-True { color: #15803d; } .dark .pv-same-True { color: #86efac; }
.pv-same-False { color: #b45309; } .dark .pv-same-False { color: #fcd34d; }
.pv-said { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 8rem; overflow: auto; }
.pv-meter { height: 5px; border-radius: 3px; margin-top: .3rem;
  background: color-mix(in srgb, var(--body-text-color) 8%, transparent); }
.pv-meter i { display: block; height: 100%; border-radius: 3px; background: #6366f1; }
#chatbot { height: clamp(300px, calc(100vh - 350px), 640px) !important; }
.pv-method { font-weight: 650; margin-bottom: .25rem; }
@media (max-width: 640px) {
  #title h1 { font-size: 1.2rem; }
  .pv-value { font-size: 1rem; }
  .pv-card { padding: .45rem .5rem; }
  #image { height: 230px !important; }
  #chatbot { height: 240px !important; }
  #shared, #chat-side { display: contents !important; }
  #shared > *, #tabs, #chat-side > *, #chat-tab > * { flex: 1 1 100%; min-width: 0 !important; }
  #tabs, #chat-tab > :first-child { order: 1; }
  #parameters, #chat-options { order: 2; }
  #insight { order: 3; }
  .pv-examples { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .pv-examples img { width: 48px; height: 48px; align-self: flex-start; }
}
"""

#: for the head of the page: gradio applies the style sheet below to the inside of its frame only
FRAME = """<style>
@media (max-width: 640px) {
  .gradio-container .main.fillable { padding: .6rem !important; }
  #tabs .tab-container button { padding: 0 .5rem !important; }
}
</style>"""


def css() -> str:
    """The style sheet; the n-th radio button of a panel shows its n-th picture, and every group of
    methods in a menu has its heading."""
    shown = ",\n".join(
        f".pv-views > input:nth-of-type({n}):checked ~ .pv-panes > .pv-pane:nth-child({n})"
        for n in range(1, MAX_STAGES + 1)
    )
    return f"{_PANEL}{shown} {{ display: block; }}\n{headings()}\n"
