"""Writes golden/*.npz from PyTorch: `python tests/parity/make_golden.py`, the same bytes each time.

A file holds what float64 PyTorch computes for one case: `names`, in order, `lengths` of each
one's values, `values` one behind the other as `comparison.sample` gives them, and `scales`, what
differences are measured against. Weights and images are not in it: `parity_cases` draws them.
"""

import pathlib
import re

import comparison
import numpy as np
import parity_cases

GOLDEN = pathlib.Path(__file__).parent / "golden"


def path_of(name: str) -> pathlib.Path:
    """The file of a case."""
    return GOLDEN / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.npz"


def main() -> None:
    import torch_side

    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.npz"):
        old.unlink()
    for name, case in parity_cases.CASES.items():
        run = comparison.comparable(case, "float64", torch_side.run_torch(case, "float64"))
        largest = comparison.scales(case, run)
        values = [comparison.sample(array, run[array]) for array in run]
        np.savez_compressed(
            path_of(name),
            names=np.array(list(run)),
            lengths=np.array([each.size for each in values]),
            scales=np.array([largest[array] for array in run]),
            values=np.concatenate(values),
        )
    total = sum(path.stat().st_size for path in GOLDEN.glob("*.npz"))
    print(f"{len(parity_cases.CASES)} files, {total / 1e6:.2f} MB in {GOLDEN}")


if __name__ == "__main__":
    main()
