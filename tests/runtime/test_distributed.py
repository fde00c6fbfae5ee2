"""Places among processes, from flags and launchers; agreements; rows of a batch by process."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.errors import UsageError
from cnn_jax.runtime import distributed
from cnn_jax.runtime.distributed import Place, find_place
from cnn_jax.runtime.platform import StopSignals

ROOT = Path(__file__).parents[2]

SLURM = {  # as srun sets them for the second of two tasks, one on each of two nodes
    "SLURM_JOB_ID": "4171",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {  # as mpirun of Open MPI 4 does
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
CLOUD_TPU = {  # as GKE sets them for the second of two hosts of a slice, here without a TPU
    "JAX_FORCE_TPU_INIT": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost,localhost",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:9",
    "MEGASCALE_NUM_SLICES": "1",
    "MEGASCALE_SLICE_ID": "0",
}
OPEN_MPI_5 = {name: value for name, value in OPEN_MPI.items() if "hnp_uri" not in name}


@pytest.fixture
def environment(monkeypatch):
    of_tpus = CLOUD_TPU.keys() - {"JAX_PLATFORMS"}
    for name in (*SLURM, *OPEN_MPI, *of_tpus, "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def set_variables(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("variables", "arguments", "place"),
    [
        ({}, (None, None, None), None),
        ({}, (None, 1, None), None),
        (SLURM, (None, 1, None), None),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (None, None, None), None),
        ({}, ("tpu:80", 4, 3), Place("tpu:80", 4, 3, detected=False)),
        (SLURM, (None, None, None), Place(None, 2, 1, detected=True)),
        (SLURM, ("node001:80", None, None), Place("node001:80", 2, 1, detected=True)),
        (OPEN_MPI, (None, None, None), Place(None, 2, 1, detected=True)),
        (OPEN_MPI_5, ("node001:80", None, None), Place("node001:80", 2, 1, detected=True)),
        (
            OPEN_MPI_5 | {"JAX_COORDINATOR_ADDRESS": "a:80"},
            (None, None, None),
            Place("a:80", 2, 1, detected=True),
        ),
    ],
)
def test_a_process_finds_its_place(environment, variables, arguments, place):
    environment(variables)
    assert find_place(*arguments) == place


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({}, ("host:80", None, None), "--num-processes and --process-id: missing. Several"),
        ({}, (None, 2, 0), "--coordinator: missing. Several processes need --coordinator=HOST"),
        ({}, (None, None, 0), "--coordinator and --num-processes: missing"),
        ({}, ("host", 2, 0), "--coordinator host: must be HOST:PORT of process 0"),
        ({}, ("host:80", 2, 2), "--process-id 2: must be from 0 to one below --num-processes, 2"),
        ({}, ("host:80", 2, -1), "--process-id -1: must be from 0"),
        (OPEN_MPI_5, (None, None, None), "missing. Open MPI does not say where process 0 is"),
    ],
)
def test_a_place_that_is_wrong_or_incomplete_is_told(environment, variables, arguments, message):
    environment(variables)
    with pytest.raises(UsageError, match=message):
        find_place(*arguments)


def test_a_process_that_is_alone_asks_nobody():
    assert distributed.is_first()
    assert distributed.who() == ""
    assert distributed.together("a", 3, sum) == 3
    assert distributed.from_first("b", lambda: [1]) == [1]
    assert distributed.any_of("c", False) is False
    assert type(distributed.stop_signals()) is StopSignals
    distributed.agree("d", pytest.fail)
    distributed.leave(1, "no one to tell")


ALONE = """
from cnn_jax.runtime import distributed
place = distributed.find_place()
distributed.join(place, timeout=20)
import jax
print(place.detected, jax.process_count(), jax.device_count(), distributed.who() or "alone")
"""


@pytest.mark.parametrize("hosts", ["localhost", None])
def test_a_tpu_machine_that_is_no_part_of_a_slice_is_one_process(hosts, environment):
    variables = CLOUD_TPU | {"TPU_WORKER_ID": "0", "JAX_COORDINATOR_PORT": str(free_port())}
    names = {} if hosts is None else {"TPU_WORKER_HOSTNAMES": hosts}
    del variables["TPU_WORKER_HOSTNAMES"]
    environment(variables | names)
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "1", "4", "alone"]


TOGETHER = """
import json, os, sys
import numpy as np
from cnn_jax.runtime import distributed
distributed.join(distributed.find_place(*json.loads(sys.argv[1])))
import jax, jax.numpy as jnp
from cnn_jax.data.datasets import DatasetInfo
from cnn_jax.data.pipeline import train_batches
from cnn_jax.data.sources import MemorySource
from cnn_jax.errors import UserError
from cnn_jax.runtime.sharding import batch_sharding, make_mesh, replicated, to_devices

index = jax.process_index()
told = {
    "first": distributed.is_first(),
    "who": distributed.who(),
    "decided": distributed.together("sum", index + 1, sum),
    "again": distributed.together("sum", 10 * (index + 1), sum),
    "of the first": distributed.from_first("index", lambda: index),
    "any": distributed.any_of("any", index == 1),
    "none": distributed.any_of("any", False),
}
places = {
    "one": sys.argv[2],
    "own": f"{sys.argv[2]}/{index}",
    "one URL": "gs://bucket/cache",
    "own URL": f"gs://bucket/{index}",
    "none": "",
    "none there": sys.argv[2] if index else "",
    "none here": "" if index else sys.argv[2],
    "a file": os.devnull,
}
told["shared"] = [name for name, path in places.items() if distributed.is_shared(path)]
distributed.agree("nothing", lambda: {"a": 1})
try:
    distributed.agree("names", lambda: {"a": 1, "b": index, **({"c": 1} if index else {})})
except UserError as error:
    told["error"] = str(error)

# Devices of the two processes in turns: each process still holds one piece of the batch.
devices = [device for pair in zip(jax.devices()[:2], jax.devices()[2:]) for device in pair]
mesh = make_mesh(fsdp=2, devices=devices)
sharding = batch_sharding(mesh)
labels = np.arange(10, dtype=np.int32)
info = DatasetInfo("small", "1", (1, 1, 1), 10, {"train": 10})
source = MemorySource(info, "train", labels.astype(np.uint8).reshape(-1, 1, 1, 1), labels)
whole = jax.jit(lambda array: array, out_shardings=replicated(mesh))
batches = train_batches(
    source, batch_size=8, seed=3, start_step=0, stop_step=5, process_index=index, process_count=2
)
told["batches"] = [
    np.asarray(whole(to_devices(batch, sharding)["label"])).tolist() for batch in batches
]
print(json.dumps(told), flush=True)
distributed.leave(0)
"""


@pytest.mark.parametrize("launcher", ["flags", "Slurm", "Open MPI", "Cloud TPU"])
def test_two_processes_join_agree_and_share_batches(launcher, environment, tmp_path):
    port = str(free_port())
    places = [[None, None, None]] * 2
    if launcher == "flags":
        places = [[f"127.0.0.1:{port}", 2, index] for index in range(2)]
    processes = []
    for index, place in enumerate(places):
        variables = {
            "flags": {},
            "Slurm": SLURM | {"SLURM_STEP_NODELIST": "localhost,other", "SLURM_PROCID": str(index)},
            "Open MPI": OPEN_MPI
            | {
                "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
                "OMPI_COMM_WORLD_RANK": str(index),
            },
            "Cloud TPU": CLOUD_TPU | {"TPU_WORKER_ID": str(index)},
        }[launcher]
        own = {"JAX_NUM_CPU_DEVICES": "2", "JAX_COORDINATOR_PORT": port, **variables}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", TOGETHER, json.dumps(place), str(tmp_path)],
                cwd=ROOT,
                env=os.environ | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    told = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    assert [each.pop("first") for each in told] == [True, False]
    assert [each.pop("who") for each in told] == ["process 0 of 2: ", "process 1 of 2: "]
    assert told[0] == told[1]
    assert told[0] == {
        "decided": 3,
        "again": 30,
        "of the first": 0,
        "any": True,
        "none": False,
        "shared": ["one", "one URL"],
        "error": "the processes of this run differ in names:\n"
        "  b: 0 in process 0, 1 in process 1\n"
        "  c: not set in process 0, 1 in process 1",
        "batches": the_batches_of_one_process(),
    }
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


WITHOUT_END = """
import json, sys
from cnn_jax.runtime import distributed
distributed.join(distributed.find_place(*json.loads(sys.argv[1])), peer_timeout=10)
print("joined", flush=True)
while True:
    distributed.any_of("name", False)
"""


def test_process_0_killed_within_an_agreement_shows_no_traceback():
    """What JAX raises there would hide what has happened, as it comes before JAX's own end."""
    place = [f"127.0.0.1:{free_port()}", 2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WITHOUT_END, json.dumps([*place, index])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    assert [process.stdout.readline() for process in processes] == ["joined\n"] * 2
    processes[0].kill()
    processes[0].communicate()
    _, errors = processes[1].communicate(timeout=200)
    assert processes[1].returncode in (75, 134, -signal.SIGABRT), errors
    assert "Traceback" not in errors


def the_batches_of_one_process():
    """Returns the labels by the definition: epochs run on, each in the order of raw Philox."""
    orders = [
        np.argsort(np.random.Philox(key=np.array([3, epoch], np.uint64)).random_raw(10))
        for epoch in range(4)
    ]
    return np.concatenate(orders).reshape(5, 8).tolist()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
