"""What the page does in the browser itself: where an answer of the server would come too late."""

from __future__ import annotations

#: for the head of the page
HEAD = """<script>
(() => {
  // Typing into a menu searches it: what stands there is selected, so that it is replaced.
  const select = event => {
    if (event.target.matches('input[role=listbox]')) setTimeout(() => event.target.select());
  };
  document.addEventListener('focusin', select);
  document.addEventListener('click', select);

  // gradio gives a chosen picture no description.
  document.addEventListener('load', event => {
    const picture = event.target;
    if (picture.matches?.('#image img:not([alt])')) picture.alt = 'the image asked about';
  }, true);

  // gradio fills the track of a slider too early: before it stands in the page, or has its ends.
  const fill = () => document.querySelectorAll('input[type=range]').forEach(range => {
    const share = (range.value - range.min) / (range.max - range.min || 1);
    range.style.setProperty('--range_progress', `${100 * share}%`);
  });
  let planned = false;
  new MutationObserver(() => {
    if (!planned) requestAnimationFrame(() => { planned = false; fill(); });
    planned = true;
  }).observe(document, {
    subtree: true, childList: true, attributes: true, attributeFilter: ['min', 'max'],
  });

  const say = (element, text) => {
    element.dataset.label ??= element.textContent;
    element.textContent = text;
    setTimeout(() => { element.textContent = element.dataset.label; }, 2000);
  };
  const savePicture = button => {
    const shown = [...button.closest('.pv').querySelectorAll('.pv-pane img')]
      .filter(image => image.checkVisibility());
    shown.forEach((image, number) => {
      const link = document.createElement('a');
      link.href = image.src;
      link.download = shown.length > 1 ? `kept-${number + 1}.jpg` : 'kept.jpg';
      link.click();
    });
  };
  const copyLink = link => {
    history.replaceState(null, '', link.href);
    const failed = () => say(link, 'The link is in the address bar');
    if (!navigator.clipboard) return failed();
    navigator.clipboard.writeText(link.href).then(() => say(link, 'Copied'), failed);
  };
  document.addEventListener('click', event => {
    const pressed = event.target.closest('[data-take]');
    if (!pressed) return;
    event.preventDefault();
    pressed.dataset.take === 'link' ? copyLink(pressed) : savePicture(pressed);
  });
})();
</script>"""

_BUBBLE = """const bubble = (role, text) =>
    ({role, content: [{type: 'text', text}], metadata: null, options: null});"""

#: (question, bubbles) -> bubbles with the question and an open answer, before the server knows
SENT = f"""(text, bubbles) => {{
  {_BUBBLE}
  if (!text.trim()) return [bubbles];
  return [[...(bubbles ?? []), bubble('user', text.trim()), bubble('assistant', '▌')]];
}}"""

#: (bubbles) -> the last answer is open again
AGAIN = f"""bubbles => {{
  {_BUBBLE}
  return [bubbles?.length ? [...bubbles.slice(0, -1), bubble('assistant', '▌')] : bubbles];
}}"""


def waiting(shown: str) -> str:
    """(question, image, *panels) -> panels that say `shown`, HTML without backticks, if there is
    something to ask."""
    return f"""(text, image, ...panels) =>
  text.trim() && image ? panels.map(() => `{shown}`) : panels"""
