"""Names beside the lines of a plot: near a point of their line, over nothing that is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: how far a name may lie from its point, in heights of a line of text
DISTANCES = (0.9, 1.5, 2.2, 3.0, 4.0, 5.0, 6.5, 8.0)
#: directions that are tried at every distance
DIRECTIONS = 16
#: what it costs that a name lies over another name, a piece of a coloured line, of a grey one; and
#: how far away it is, for every height of text
OVER_NAME, OVER_COLOR, OVER_GREY, AWAY = 1000.0, 10.0, 0.5, 2.0
#: what is kept free around a name, in heights of text: marks are larger than their points
MARGIN = 0.35
#: from how many heights of text on a thin line leads from the name to its point
LEADER = 1.6
#: points that are looked at along every line
SAMPLES = 60


@dataclass
class Line:
    """A line that gets a name; points: (x, y) in the numbers of the axes."""

    name: str
    color: str
    points: list[tuple[float, float]]


def name_lines(axes, lines: list[Line]) -> None:
    """Writes the name of every line beside one of its points, inside the axes. Call it when all
    else is drawn, as sizes and limits of the axes are taken as they are then; the picture must be
    saved with the figure's own dots per inch."""
    figure = axes.figure
    axes.autoscale(False)  # lines to the names change no limits
    figure.draw_without_rendering()
    own = {line.name: _along(axes, line.points) for line in lines}
    grey = np.concatenate(
        [np.empty((0, 2))]
        + [_along(axes, drawn.get_xydata()) for drawn in axes.lines if len(drawn.get_xdata()) > 1]
    )
    frame = axes.get_window_extent()
    taken: list[np.ndarray] = []
    for line in lines:
        text = axes.annotate(
            line.name,
            line.points[0],
            xytext=(0, 0),
            textcoords="offset pixels",
            color=line.color,
            fontweight="bold",
            ha="center",
            va="center",
            zorder=5,
        )
        text.set_in_layout(False)
        box = text.get_window_extent()
        size = np.array([box.width, box.height])
        color = np.concatenate(list(own.values()))
        spots = _spots(axes, line.points, size, frame)
        point, middle = min(spots, key=lambda s: _cost(*s, size, taken, color, grey))
        text.xy = axes.transData.inverted().transform(point)
        text.set_position(tuple(middle - point))
        taken.append(np.array([middle - size / 2, middle + size / 2]))
        if _gap(point, middle, size) > LEADER * size[1]:
            end = np.clip(point, *taken[-1])
            pair = axes.transData.inverted().transform([point, end])
            axes.plot(*pair.T, color=line.color, alpha=0.5, linewidth=0.8, zorder=1.6)


def _along(axes, points) -> np.ndarray:
    """(n, 2) pixels along a line through points of the axes."""
    pixels = axes.transData.transform(np.asarray(points, dtype=float))
    at = np.linspace(0, len(pixels) - 1, SAMPLES)
    return np.stack([np.interp(at, range(len(pixels)), column) for column in pixels.T], axis=1)


def _spots(axes, points, size: np.ndarray, frame) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pixels of a point of the line, and of the middle of a name beside it that lies within the
    frame; the point itself where the frame is too small for any."""
    pixels = axes.transData.transform(np.asarray(points, dtype=float))
    low, high = np.array([frame.x0, frame.y0]) + size / 2, np.array([frame.x1, frame.y1]) - size / 2
    turns = np.linspace(0, 2 * np.pi, DIRECTIONS, endpoint=False)
    ways = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    found = []
    for point in pixels:
        for distance in DISTANCES:
            for way in ways:
                # From the edge of the name, not from its middle: names are wide.
                middle = point + way * (distance * size[1] + way**2 * (size / 2 - size[1] / 2))
                if np.all(middle >= low) and np.all(middle <= high):
                    found.append((point, middle))
    return found or [(pixels[0], pixels[0])]


def _gap(point: np.ndarray, middle: np.ndarray, size: np.ndarray) -> float:
    """Pixels between a point and the nearest edge of a name."""
    return float(np.linalg.norm(np.maximum(np.abs(point - middle) - size / 2, 0)))


def _cost(point, middle, size, taken: list[np.ndarray], color: np.ndarray, grey: np.ndarray):
    low, high = middle - size / 2 - MARGIN * size[1], middle + size / 2 + MARGIN * size[1]
    names = sum(bool(np.all(low < box[1]) and np.all(high > box[0])) for box in taken)
    inside = [np.all((dots > low) & (dots < high), axis=1).sum() for dots in (color, grey)]
    away = _gap(point, middle, size) / size[1]
    return OVER_NAME * names + OVER_COLOR * inside[0] + OVER_GREY * inside[1] + AWAY * away
