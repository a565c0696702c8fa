"""What a pruning method promises, as tests that any package can run on a method of its own.

    from llava.pruning.testing import MethodContract, OwnGridsContract


    class TestUniform(MethodContract):
        method = "uniform"


    class TestUniformOnOwnGrids(OwnGridsContract):
        method = "uniform"

The first is about LLaVA, the second about models whose images have grids of their own. Needs pytest
and nothing else beside this package: the models are tiny random ones, made in memory.
"""

import pytest

pytest.register_assert_rewrite(
    *(f"llava.pruning.testing.{name}" for name in ("promises", "contract", "own_grids"))
)

from .contract import MethodContract  # noqa: E402
from .own_grids import OwnGridsContract  # noqa: E402

__all__ = ["MethodContract", "OwnGridsContract"]
