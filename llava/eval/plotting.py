"""matplotlib, where it is installed."""


def import_pyplot():
    """Returns matplotlib's pyplot, drawing into files only; it belongs to the extra `eval`."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("matplotlib is missing: pip install -e '.[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
