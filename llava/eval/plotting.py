"""matplotlib, where it is installed."""

from llava.errors import how_to_install


def import_pyplot():
    """Returns matplotlib's pyplot, drawing into files only; it belongs to the extra `eval`."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"matplotlib is missing: {how_to_install('eval')}") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
