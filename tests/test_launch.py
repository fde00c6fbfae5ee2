"""The recipes in `launch/`, run as they stand by a launcher that local processes play."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FLAGS = ["--config=configs/quickstart.py", "--dry-run"]

SRUN = """#!/usr/bin/env bash
# What Slurm's srun does for two tasks: the command in each, with the place of each.
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first && wait $second
"""

SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*"
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def path(tmp_path):
    """A PATH on which `python` is this one, and Slurm's commands are played."""
    for name, content in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    return f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def environment(path, **variables):
    own = {"PATH": path, "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT), **variables}
    return os.environ | own


def assert_one_run_of_two_processes(outputs):
    text = "\n".join(outputs)
    assert text.count("devices    4 x cpu") == 1, text
    assert text.count("dry run: the configuration is good") == 1, text
    assert "Traceback" not in text


@pytest.mark.slow
def test_slurm(path):
    variables = {"SLURM_JOB_ID": "9", "JAX_COORDINATOR_PORT": str(free_port())}
    command = ["bash", "launch/slurm.sh"]
    env = environment(path, **variables)
    done = subprocess.run([*command, *FLAGS], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_one_run_of_two_processes([done.stdout, done.stderr])
    assert "scontrol" not in done.stdout


@pytest.mark.parametrize(("code", "requeued"), [(143, True), (1, True), (2, False)])
def test_slurm_starts_again_what_another_start_mends(path, tmp_path, code, requeued):
    (tmp_path / "srun").write_text(f"#!/usr/bin/env bash\nexit {code}\n")
    done = subprocess.run(
        ["bash", "launch/slurm.sh"],
        cwd=ROOT,
        env=environment(path, SLURM_JOB_ID="9"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert ("scontrol requeue 9" in done.stdout) == requeued


@pytest.mark.parametrize(
    ("code", "conditions", "action"),
    [
        (2, [], "FailJobSet"),
        (143, [], "RestartJobSetAndIgnoreMaxRestarts"),
        (None, ["DisruptionTarget"], "RestartJobSetAndIgnoreMaxRestarts"),
        (1, [], "RestartJobSet"),
        (75, [], "RestartJobSet"),
        (137, [], "RestartJobSet"),
    ],
)
def test_kubernetes_starts_again_what_another_start_mends(code, conditions, action):
    """By Kubernetes' rules for pods, then JobSet's for jobs: in each the first that fits holds."""
    jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    workers, policy = job["template"]["spec"], jobset["spec"]["failurePolicy"]
    assert workers["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(workers["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        codes = rule.get("onExitCodes", {"operator": "In", "values": []})
        asked = {(each["type"], each["status"]) for each in rule.get("onPodConditions", ())}
        assert codes["operator"] == "In"
        if code in codes["values"] or asked & {(each, "True") for each in conditions}:
            reason = "PodFailurePolicy"
            message = f"Pod default/x failed matching FailJob rule at index {index}"
            break
    found = "RestartJobSet"  # JobSet's own, where no rule fits
    for rule in policy["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            found = rule["action"]
            break
    assert found == action
    assert policy["maxRestarts"] == 20


@pytest.mark.slow
def test_kubernetes(path):
    jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    workers = job["template"]["spec"]
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert workers["completions"] == workers["parallelism"] == int(variables["NUM_PROCESSES"])
    # JobSet's names of pods, https://jobset.sigs.k8s.io: <jobset>-<job>-<replica>-<pod>.<subdomain>
    name = jobset["metadata"]["name"]
    host = f"{name}-{job['name']}-0-0.{pod['subdomain']}"
    assert variables["COORDINATOR"].partition(":")[0] == host
    (volume,) = container["volumeMounts"]
    cache = Path(variables.pop("JAX_COMPILATION_CACHE_DIR"))
    assert cache.is_relative_to(volume["mountPath"])

    variables["COORDINATOR"] = f"127.0.0.1:{free_port()}"
    children = [
        subprocess.Popen(
            [*container["command"], *FLAGS],
            cwd=ROOT,
            env=environment(path, **variables, JOB_COMPLETION_INDEX=str(index)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [child.communicate(timeout=200)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert_one_run_of_two_processes(outputs)


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_good_bash(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_tpu_hands_the_command_on_word_by_word(tmp_path):
    (tmp_path / "gcloud").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "gcloud").chmod(0o755)
    flags = ["--config=configs/synthetic.py", "--workdir=/shared/a run"]
    done = subprocess.run(
        ["bash", "launch/tpu.sh", "pod", "us-west4-a", *flags],
        cwd=ROOT,
        env=environment(f"{tmp_path}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
    )
    *_, command = done.stdout.strip().splitlines()
    assert "--worker=all" in done.stdout
    script = command.removeprefix("--command=cd ~/cnn_jax && ").replace("python", "printf '%s\\n'")
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout
    assert words.splitlines() == ["train.py", *flags]
