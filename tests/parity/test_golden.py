"""The package beside numbers that PyTorch gave once (`make_golden.py`); PyTorch is not needed."""

import comparison
import make_golden
import numpy as np
import parity_cases
import pytest


def load(name):
    """The samples and scales of a case."""
    with np.load(make_golden.path_of(name)) as file:
        names = file["names"].tolist()
        values = np.split(file["values"], np.cumsum(file["lengths"])[:-1])
        return dict(zip(names, values, strict=True)), dict(
            zip(names, file["scales"].tolist(), strict=True)
        )


@pytest.mark.parametrize("dtype", comparison.TOLERANCES)
@pytest.mark.parametrize("name", parity_cases.CASES)
def test_everything_equals_what_pytorch_gave(name, dtype):
    case = parity_cases.CASES[name]
    expected, largest = load(name)
    expected = comparison.comparable(case, dtype, expected)
    run = comparison.run_flax(case, dtype)
    sampled = {what: comparison.sample(what, array) for what, array in run.items()}
    comparison.assert_equal(
        comparison.errors(sampled, expected, largest), comparison.TOLERANCES[dtype]
    )


def test_the_files_are_those_of_the_cases_and_small():
    files = set(make_golden.GOLDEN.iterdir())
    assert files == {make_golden.path_of(name) for name in parity_cases.CASES}
    assert sum(path.stat().st_size for path in files) < 2e6
