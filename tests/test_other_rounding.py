"""What is compared with recorded results holds on another kind of CPU, too."""

import pytest
import torch

from tests.golden_cases import SHARED, SHIPPED, load_cases, run_case
from tests.other_rounding import other_rounding


def test_inside_products_differ_in_the_last_bit_and_exact_sums_do_not():
    torch.manual_seed(0)
    x, y = torch.randn(64, 200), torch.randint(-3, 4, (64, 200)).float()
    plain, exact = x @ x.T, y @ y.T
    with other_rounding():
        other, other_exact = x @ x.T, y @ y.T
    assert not torch.equal(plain, other) and torch.equal(exact, other_exact)
    torch.testing.assert_close(plain, other)


def test_a_selection_that_rounding_decides_passes_whatever_the_rounding():
    """The case whose recorded tokens one kind of CPU does not keep."""
    folders = [root / "vispruner" for root in (SHARED, SHIPPED) if (root / "vispruner").exists()]
    cases = {case["id"]: case for case in load_cases(folders[0])}
    case = cases.get("v15_img2_t96_r025") or next(c for c in cases.values() if not c["exact"])
    with other_rounding():
        assert run_case(case, folders[0]) == []


@pytest.mark.parametrize("name", ["divprune", "adaptprune", "visionzip"])
def test_recorded_selections_hold_whatever_the_rounding(name):
    folder = SHIPPED / name
    case = next(case for case in load_cases(folder) if case["kind"] == "e2e")
    with other_rounding():
        assert run_case(case, folder) == []
