"""A run on object storage: killed at any instant, it ends with the same bits as one on a disk."""

import json
import re
import signal

import fsspec
import pytest
from driver import TOTAL_STEPS, assert_events_are_the_rows, assert_same_run
from object_stores import STORES, download

from cnn_jax.__main__ import main

pytest.importorskip("moto")
pytest.importorskip("gcp_storage_emulator")


@pytest.fixture(scope="module", params=STORES)
def store(request):
    """The URL of a bucket, and the environment of a process that may use it."""
    with STORES[request.param]() as store:
        yield store


def exists(url):
    """Returns a function that tells whether there is such an object."""
    files, path = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    return lambda: files.exists(path)


@pytest.mark.slow
def test_a_kill_while_saving_ends_as_a_run_on_a_disk(trainer, tmp_path, store, reference):
    bucket, environment = store
    workdir = f"{bucket}/runs/killed"
    child = trainer.start(workdir, environment=environment)
    child.wait_for(exists(f"{workdir}/checkpoints/9/_CHECKPOINT_METADATA"))
    child.kill()
    assert not exists(f"{workdir}/checkpoints/9/commit_success.txt")()
    code, output = trainer.run(workdir, environment=environment)
    assert code == 0, output
    assert re.search("going on from step [68] of 24", output), output
    assert f"written to {workdir}: metrics.jsonl" in output
    copy = download(workdir, tmp_path)
    assert_same_run(copy, reference)
    assert_events_are_the_rows(copy)
    assert {"summary.json", "curves.png", "config.json"} <= {path.name for path in copy.iterdir()}
    assert "this run is complete" in trainer.run(workdir, environment=environment)[1]


@pytest.mark.slow
@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_the_newest_start_has_the_directory_and_other_commands_read_it(
    trainer, tmp_path, store, reference, train_here, capsys
):
    bucket, environment = store
    workdir = f"{bucket}/runs/taken"
    first = trainer.start(workdir, environment=environment)
    first.wait_for("step 4/24")
    first.send(signal.SIGSTOP)  # as a machine that is taken for lost
    code, output = trainer.run(workdir, environment=environment)
    assert code == 0, output
    first.send(signal.SIGCONT)
    assert first.end() == 1, first.output
    assert "has begun to train there after this one, which ends" in first.lines[-1]
    assert_same_run(download(workdir, tmp_path), reference)
    code, output = train_here(workdir)
    assert code == 0, output
    assert f"{workdir}: this run is complete, at step {TOTAL_STEPS}" in output
    assert main(["evaluate", "--workdir", workdir]) == 0
    told = json.loads((reference / "summary.json").read_text())
    assert f"top-1 {told['test/accuracy']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_two_processes_end_as_one_on_a_disk(trainer, tmp_path, store):
    """Compiled as in use, as two programs are compared bit for bit."""
    bucket, environment = store
    workdir = f"{bucket}/runs/two"
    codes, outputs = trainer.run_two(workdir, environment={**environment, "XLA_FLAGS": ""})
    assert codes == [0, 0], outputs
    code, output = trainer.run(tmp_path / "one", environment={"JAX_NUM_CPU_DEVICES": "2"})
    assert code == 0, output
    assert_same_run(download(workdir, tmp_path / "two"), tmp_path / "one")
