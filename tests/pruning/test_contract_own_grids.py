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

    @pytest.fixture
    def pruner(self):
        """Without relevance two patches that cover each other add the same, and rounding decides
        between them: in these images from the seventh pick on."""
        return self.make(self.method, 6)


class TestMustDropWhereWindowsMerge(OwnGridsContract):
    method, options = "mustdrop", {"spatial_threshold": 0.02}
