"""What every method in METHODS promises where images have grids of their own."""

import pytest

from llava.pruning import METHODS
from llava.pruning.testing import OwnGridsContract
from tests.conftest import make_pruner
from tests.pruning.test_contract import CHAINS

#: methods that need what only a CLIP tower has
REFUSED = {"cdpruner", "eadp", "prumerge"}


class TestEveryMethod(OwnGridsContract):
    make = staticmethod(make_pruner)

    @pytest.fixture(params=[*sorted(METHODS), *CHAINS])
    def pruner(self, request):
        return make_pruner(request.param)

    def is_refused(self, pruner):
        return pruner.name in REFUSED


class TestCDPrunerOnDiversityAlone(OwnGridsContract):
    method, options = "cdpruner", {"theta": 0}


class TestEADPOnCoverageAlone(OwnGridsContract):
    method, options = "eadp", {"beta": 0}


class TestMustDropWhereWindowsMerge(OwnGridsContract):
    method, options = "mustdrop", {"spatial_threshold": 0.02}
