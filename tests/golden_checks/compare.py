"""Comparisons that say what differs instead of raising."""

import json

import numpy as np

SCORES_ATOL = 1e-4


class Report:
    """Differences between what a case recorded and what we compute; empty when all match.

    prefix: said before every difference, to tell the parts of a large case apart.
    """

    def __init__(self):
        self.problems: list[str] = []
        self.prefix = ""

    def __bool__(self) -> bool:
        return bool(self.problems)

    def add(self, text: str) -> None:
        self.problems.append(f"{self.prefix}{text}")

    def true(self, name: str, condition) -> None:
        if not condition:
            self.add(name)

    def equal(self, name: str, ours, recorded) -> None:
        """Exactly equal numbers, arrays, texts or nested lists of them."""
        ours, recorded = _plain(ours), _plain(recorded)
        if isinstance(ours, np.ndarray) and isinstance(recorded, np.ndarray):
            if ours.shape != recorded.shape:
                self.add(f"{name}: shape {ours.shape}, recorded {recorded.shape}")
            elif (different := ours != recorded).any():
                first = np.argwhere(different)[0].tolist()
                self.add(
                    f"{name}: {different.sum()} of {different.size} differ, first at {first}: "
                    f"{ours[tuple(first)]}, recorded {recorded[tuple(first)]}"
                )
        elif ours != recorded:
            self.add(f"{name}: {_short(ours)}, recorded {_short(recorded)}")

    def close(self, name: str, ours, recorded, atol: float, rtol: float = 0.0) -> None:
        """Equal within atol + rtol * |recorded|."""
        ours, recorded = np.asarray(_plain(ours), float), np.asarray(_plain(recorded), float)
        if ours.shape != recorded.shape:
            self.add(f"{name}: shape {ours.shape}, recorded {recorded.shape}")
            return
        error = np.abs(ours - recorded)
        if error.size and not (error <= atol + rtol * np.abs(recorded)).all():
            self.add(
                f"{name}: off by up to {error.max():.2e}, allowed {atol:.0e} + {rtol:.0e} relative"
            )


def _plain(value):
    """Tensors and lists of numbers as arrays, everything else as it is."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
        return value.numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)
    if isinstance(value, tuple):
        return list(value)
    return value


def _short(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text) if len(text) < 200 else repr(text[:200]) + "..."
