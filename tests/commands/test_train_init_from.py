"""A run that starts from weights: exactly these at step 0, and as unbreakable as any other."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import FLAGS, ROOT, assert_same_weights, read_state
from flax.traverse_util import flatten_dict

from cnn_jax.commands.convert import convert
from cnn_jax.config import override, parse
from cnn_jax.models.torch_weights import to_torch
from cnn_jax.plan import make_plan
from cnn_jax.runtime.weight_files import read_directory, write_tensors


@pytest.fixture(scope="module")
def weights(reference, tmp_path_factory):
    """A file with the last weights of a run of the same model."""
    path = tmp_path_factory.mktemp("weights") / "last.safetensors"
    convert(reference, path)
    return path


def plan_of(monkeypatch, **changes):
    """The plan of the driver's run on all 8 devices, with some keys changed."""
    monkeypatch.syspath_prepend(ROOT)
    values = importlib.import_module("configs.default").get_config().to_dict()
    flags = dict(flag.removeprefix("--config.").split("=", 1) for flag in FLAGS[1:])
    values = override(values, [*flags.items()]) | changes
    return make_plan(parse(values, num_devices=8, check_weights=True))


@pytest.mark.parametrize("mesh", [{"data": -1, "fsdp": 1}, {"data": 4, "fsdp": 2}])
@pytest.mark.parametrize("kind", ["file", "directory", "float64"])
def test_step_0_has_exactly_the_weights_of_the_file(
    kind, mesh, weights, reference, tmp_path, monkeypatch
):
    expected, _ = read_directory(reference)
    path = {"file": weights, "directory": reference}.get(kind, tmp_path / "double.safetensors")
    if kind == "float64":
        write_tensors(path, to_torch(jax.tree.map(np.float64, expected)))
    plan = plan_of(monkeypatch, init_from=str(path), mesh=mesh)
    state = plan.make_state()
    assert f"weights    start from {path}\n" in plan.describe()
    assert int(state.step) == 0
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    found = flatten_dict({"params": state.params, "batch_stats": state.batch_stats})
    assert found.keys() == flatten_dict(expected).keys()
    for key, array in flatten_dict(expected).items():
        assert found[key].dtype == np.float32
        assert np.asarray(found[key]).tobytes() == array.tobytes(), key
    assert jax.tree.all(
        jax.tree.map(
            lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), state, plan.state
        )
    )


def test_ignored_parts_start_as_they_would_without_a_file(weights, reference, monkeypatch):
    plan = plan_of(monkeypatch, init_from=str(weights), init_ignore=("head", "stem/conv"))
    assert "weights    start from " in plan.describe()
    assert "last.safetensors, head, stem/conv at random\n" in plan.describe()
    params = flatten_dict(plan.make_state().params, sep="/")
    random = flatten_dict(plan_of(monkeypatch).make_state().params, sep="/")
    loaded = flatten_dict(read_directory(reference)[0]["params"], sep="/")
    for path, array in params.items():
        source = random if path.startswith(("head/", "stem/conv/")) else loaded
        np.testing.assert_array_equal(array, source[path], err_msg=path)


def test_a_killed_run_goes_on_without_the_file(trainer, weights, reference, tmp_path):
    path = tmp_path / "start.safetensors"
    path.write_bytes(weights.read_bytes())
    flag = f"--config.init_from={path}"
    code, output = trainer.run(tmp_path / "undisturbed", flag)
    assert code == 0, output
    assert output.count(str(path)) == 1

    child = trainer.start(tmp_path / "killed", flag)
    child.wait_for("step 14/24")
    child.kill()
    path.unlink()
    code, output = trainer.run(tmp_path / "killed", flag)
    assert code == 0, output
    assert "going on from step" in output
    assert_same_weights(tmp_path / "killed", tmp_path / "undisturbed")
    first, random = (
        read_state(run / "checkpoints" / "24") for run in (tmp_path / "killed", reference)
    )
    assert any(first[name].tobytes() != random[name].tobytes() for name in first)


def test_all_mistakes_are_found_before_anything_is_made(train_here, weights, tmp_path):
    code, output = train_here(
        tmp_path / "run",
        f"--config.init_from={weights}",
        "--config.init_ignore=hed,",
        "--config.model.width=8",
        "--config.seed=-1",
    )
    assert code == 2
    assert "  seed = -1: must be" in output
    assert f"  init_from = '{weights}': conv1.weight: float32 (4, 1, 3, 3), must be " in output
    assert (
        f"  init_from = '{weights}': fc.weight: float32 (10, 4), must be floating (10, 8)" in output
    )
    assert (
        "hed: to be ignored, but there is no such part or tensor (did you mean 'head'?)" in output
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--config.init_from={}x"], "init_from = '{0}x': no file '{0}x' (did you mean '{0}'?)"),
        (["--config.init_from=."], "init_from = '.': "),
        (["--config.init_ignore=head,"], "init_ignore = ('head',): only with init_from"),
    ],
)
def test_a_file_that_cannot_be_had(flags, text, train_here, weights, tmp_path):
    code, output = train_here(tmp_path / "run", *(flag.format(weights) for flag in flags))
    assert code == 2
    assert text.format(weights) in output
    assert not (tmp_path / "run").exists()
