"""A data set with a flipped byte: named and refused, or named, counted and passed over."""

import json
import re
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def damaged(trainer, reference, tmp_path) -> Path:
    """The prepared data set with a byte flipped among the first 512 training records."""
    (prepared,) = (flag.partition("=")[2] for flag in trainer.flags if "data_dir" in flag)
    copy = shutil.copytree(prepared, tmp_path / "data")
    (path,) = copy.rglob("*-train.array_record*")
    content = bytearray(path.read_bytes())
    content[100_000] ^= 0x40
    path.write_bytes(content)
    return copy


def test_by_default_it_names_file_and_record_and_ends(train_here, tmp_path, damaged):
    code, output = train_here(tmp_path / "run", f"--config.data.data_dir={damaged}")
    assert code == 1
    assert re.search(r"train.array_record-00000-of-00001 is damaged: record \d+ cannot", output)
    assert "Traceback" not in output


@pytest.mark.slow
def test_skipped_ones_are_named_once_and_counted_also_after_a_kill(trainer, tmp_path, damaged):
    flags = (
        f"--config.data.data_dir={damaged}",
        "--config.data.on_bad_record=skip",
        "--config.data.memory_limit_mb=0",
    )
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    child = trainer.start(workdir, *flags)
    child.wait_for("step 14/24")
    child.kill()
    for each in (workdir, whole):
        code, output = trainer.run(each, *flags)
        assert code == 0, output
    told = re.findall(r"record skipped, .* record (\d+) cannot be read", output)
    assert len(told) == len(set(told)) > 0
    counts = {"train": len(told), "test": 0}
    for each in (workdir, whole):
        assert json.loads((each / "summary.json").read_text())["bad_records"] == counts
