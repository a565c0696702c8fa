"""Cases of one test that start programs: the first belongs to the quick tests, the others are
slow."""

import pytest


def others_slow(cases):
    """Returns parameters for `pytest.mark.parametrize`; a case with several values is a tuple."""
    first, *others = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [
        pytest.param(*first),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in others),
    ]
