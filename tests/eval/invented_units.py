"""Units out of numbers, for tests of what is made of units."""

from llava.eval.scoring.units import Unit, Units


def mean_of(points, images=None) -> Units:
    """Units whose score is the mean of points from 0 to 1; images: of each, none if left out."""
    images = [None] * len(points) if images is None else images
    pairs = enumerate(zip(points, images, strict=True))
    return Units([Unit(key, float(point), "", image) for key, (point, image) in pairs])
