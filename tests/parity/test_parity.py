"""Every number of every case, in both precisions: PyTorch's of once, and of one that runs beside.

The files of `make_golden.py` need no PyTorch.
"""

import comparison
import make_golden
import numpy as np
import parity_cases
import pytest


@pytest.fixture(
    scope="module",
    params=[(name, dtype) for name in parity_cases.CASES for dtype in comparison.TOLERANCES],
    ids="-".join,
)
def of_case(request):
    """The name of a case, a precision, and what the package makes of them."""
    name, dtype = request.param
    return name, dtype, comparison.run_flax(parity_cases.CASES[name], dtype)


def load(name):
    """The samples and scales of a case."""
    with np.load(make_golden.path_of(name)) as file:
        names = file["names"].tolist()
        values = np.split(file["values"], np.cumsum(file["lengths"])[:-1])
        return dict(zip(names, values, strict=True)), dict(
            zip(names, file["scales"].tolist(), strict=True)
        )


def test_everything_equals_what_pytorch_gave(of_case):
    name, dtype, ours = of_case
    expected, largest = load(name)
    expected = comparison.comparable(parity_cases.CASES[name], dtype, expected)
    sampled = {what: comparison.sample(what, array) for what, array in ours.items()}
    comparison.assert_equal(
        comparison.errors(sampled, expected, largest), comparison.TOLERANCES[dtype]
    )


def test_everything_equals_pytorch(of_case):
    pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[parity]"')
    import torch_side

    name, dtype, ours = of_case
    case = parity_cases.CASES[name]
    expected = comparison.comparable(case, dtype, torch_side.run_torch(case, dtype))
    found = comparison.errors(ours, expected, comparison.scales(case, expected))
    comparison.assert_equal(found, comparison.TOLERANCES[dtype])


def test_the_files_are_those_of_the_cases_and_small():
    files = set(make_golden.GOLDEN.iterdir())
    assert files == {make_golden.path_of(name) for name in parity_cases.CASES}
    assert sum(path.stat().st_size for path in files) < 2e6
