"""The package beside PyTorch, both running: every number of every case, in both precisions."""

import comparison
import parity_cases
import pytest

pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[parity]"')
import torch_side


@pytest.mark.parametrize("dtype", comparison.TOLERANCES)
@pytest.mark.parametrize("name", parity_cases.CASES)
def test_everything_equals_pytorch(name, dtype):
    case = parity_cases.CASES[name]
    expected = comparison.comparable(case, dtype, torch_side.run_torch(case, dtype))
    found = comparison.errors(
        comparison.run_flax(case, dtype), expected, comparison.scales(case, expected)
    )
    comparison.assert_equal(found, comparison.TOLERANCES[dtype])
