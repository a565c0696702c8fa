"""What a pruning method promises, as tests that any package can run on a method of its own.

    from llava.pruning.testing import MethodContract


    class TestUniform(MethodContract):
        method = "uniform"

Needs pytest and nothing else beside this package: the model is a tiny random one, made in memory.
"""

import pytest

pytest.register_assert_rewrite("llava.pruning.testing.contract")

from .contract import MethodContract  # noqa: E402

__all__ = ["MethodContract"]
