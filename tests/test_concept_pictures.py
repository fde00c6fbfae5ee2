"""The pictures of the concept pages are those that `docs/make_pictures.py` draws."""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"

TRAINED = {"attention", "squeeze_excite"}
"""Of networks trained for 150 steps, which another processor rounds differently."""

OF_A_BROWSER = {"serve"}
"""Not drawn but taken; CONTRIBUTING.md says how."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A folder with all pictures, drawn anew by the documented command."""
    folder = tmp_path_factory.mktemp("pictures")
    result = subprocess.run(
        [sys.executable, "docs/make_pictures.py", str(folder)],
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # each program runs but once
        },
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return folder


def test_every_picture_of_a_document_is_there_and_every_picture_is_shown():
    shown = set()
    for page in ROOT.glob("docs/**/*.md"):
        for path in re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / path).is_file(), (page, path)
            shown.add((page.parent / path).resolve())
    assert shown == set(PICTURES.iterdir())


@pytest.mark.slow
def test_the_script_draws_them(drawn):
    kept = {path.stem for path in PICTURES.iterdir()}
    assert {path.stem for path in drawn.iterdir()} == kept - OF_A_BROWSER
    for path in drawn.iterdir():
        ours, theirs = Image.open(path), Image.open(PICTURES / path.name)
        assert np.asarray(ours.convert("L")).std() > 10, f"{path.stem} is blank"
        if f"version{matplotlib.__version__}," not in theirs.info["Software"]:
            continue  # another version sets type by other rules
        assert ours.size == theirs.size, path.stem
        off = np.abs(np.subtract(ours.convert("L"), theirs.convert("L"), dtype=np.int16))
        if path.stem in TRAINED:
            assert off.mean() < 15, path.stem
        else:
            assert (off > 16).mean() < 0.005, path.stem
