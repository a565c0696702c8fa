"""Progress bars of programs that measure."""

from collections.abc import Iterable

from tqdm import tqdm

#: seconds after which a bar shows up: what is over sooner needs none
PATIENCE = 5.0


def progress(steps: Iterable | int, label: str, unit: str) -> tqdm:
    """A bar on stderr, where that is a terminal, that goes through `steps`, or is moved on with
    `update` where they are a number."""
    counted = {"total": steps} if isinstance(steps, int) else {"iterable": steps}
    return tqdm(**counted, desc=label, unit=f" {unit}", delay=PATIENCE, disable=None)
