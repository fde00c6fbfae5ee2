"""A data set with a flipped byte: named and refused, or named, counted and passed over."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

SKIPPED = r"record skipped, .*-(train|test)\.array_record\S* is damaged: record (\d+) cannot"


def copy_with_flipped_bytes(trainer, to, places) -> Path:
    """Returns the copy; `places` are bytes of the file of each split."""
    (prepared,) = (flag.partition("=")[2] for flag in trainer.flags if "data_dir" in flag)
    shutil.copytree(prepared, to)
    for split, of_split in places.items():
        (path,) = to.rglob(f"*-{split}.array_record*")
        content = bytearray(path.read_bytes())
        for place in of_split:
            content[place] ^= 0x40
        path.write_bytes(content)
    return to


@pytest.fixture
def damaged(trainer, reference, tmp_path) -> Path:
    """The prepared data set with bytes flipped in the records that the runs read."""
    places = {"train": range(20_000, 250_000, 23_000), "test": [30_000]}
    return copy_with_flipped_bytes(trainer, tmp_path / "data", places)


def test_by_default_it_names_file_and_record_and_ends(train_here, tmp_path, damaged):
    code, output = train_here(tmp_path / "run", f"--config.data.data_dir={damaged}")
    assert code == 1
    assert re.search(r"train.array_record-00000-of-00001 is damaged: record \d+ cannot", output)
    assert "Traceback" not in output


@pytest.mark.slow
def test_an_error_in_one_process_of_two_ends_both_with_its_words(trainer, reference, tmp_path):
    damaged = copy_with_flipped_bytes(trainer, tmp_path / "data", {"train": [20_000]})
    codes, outputs = trainer.run_two(
        tmp_path / "run",
        f"--config.data.data_dir={damaged}",
        "--config.data.memory_limit_mb=0",
        "--config.data.residency=host",
    )
    assert codes == [1, 1], outputs
    failed = next(i for i, each in enumerate(outputs) if f"process {i} of 2: /" in each)
    (told,) = (each for each in outputs[failed].splitlines() if "is damaged: record" in each)
    error = told.removeprefix(f"process {failed} of 2: ")
    assert outputs[1 - failed].splitlines()[-1] == f"process {failed} of 2 has ended: {error}"
    assert not any("Traceback" in each for each in outputs)


@pytest.mark.slow
def test_skipped_ones_are_named_once_and_counted_also_after_a_kill(trainer, tmp_path, damaged):
    flags = (
        f"--config.data.data_dir={damaged}",
        "--config.data.on_bad_record=skip",
        "--config.data.memory_limit_mb=0",
        "--config.data.residency=host",
    )
    two, one = tmp_path / "two", tmp_path / "one"
    first, second = trainer.start_two(two, *flags)
    first.wait_for("step 14/24")
    first.kill()
    second.end()
    codes, (again, silent) = trainer.run_two(two, *flags)
    assert codes == [0, 0], again
    assert "record skipped" not in silent
    code, whole = trainer.run(one, *flags)
    assert code == 0, whole
    told = [re.findall(SKIPPED, each) for each in (first.output, again, whole)]
    assert all(len(each) == len(set(each)) for each in told), "each is told once"
    assert {*told[0], *told[1]} == set(told[2])
    counts = Counter(split for split, _ in told[2])
    assert min(counts["train"], counts["test"]) > 0
    for each in (two, one):
        assert json.loads((each / "summary.json").read_text())["bad_records"] == counts
