"""BatchNorm's statistics by device: no collective, and one set of statistics in the end."""

import jax
import numpy as np
import oracles
import pytest
from planned import batches, plan

from cnn_jax.runtime import hlo
from cnn_jax.runtime.checkpoint import Checkpoints
from cnn_jax.runtime.compiler import compile_program
from cnn_jax.runtime.sharding import batch_sharding, to_devices
from cnn_jax.runtime.weight_files import read_directory
from cnn_jax.training.statistics import pool_statistics, spread_statistics

pytestmark = pytest.mark.usefixtures("compile_quickly")

DEVICE = ("batch_norm.statistics", "device")
PLAIN = (
    ("optimizer.momentum", "0"),
    ("optimizer.nesterov", "false"),
    ("optimizer.weight_decay", "0"),
)


def train(made, number):
    step = compile_program(made.lower_train_step(), made.compiler.options)
    state, key, sums = made.make_state(), made.make_key(), {}
    for batch in batches(number):
        state, sums = step(state, to_devices(batch, batch_sharding(made.mesh)), key)
    return state, jax.device_get(sums)


def collectives(*texts):
    """Those of the compiled step, the sizes of parameters and statistics with it."""
    made = plan(*texts)
    program = hlo.read(compile_program(made.lower_train_step()).as_text())
    params = sum(leaf.size for leaf in jax.tree.leaves(made.state.params))
    return hlo.collectives(program), params


@pytest.mark.parametrize(
    "choice", ["device", "group:1", pytest.param("group:2", marks=pytest.mark.slow)]
)
def test_statistics_within_a_device_take_no_collective(choice):
    """What is reduced are the gradients and the two sums of the metrics, to the byte."""
    found, params = collectives(("batch_norm.statistics", choice))
    assert {each.kind for each in found} == {"all-reduce"}
    assert sum(each.bytes for each in found) == 4 * (params + 2)


def test_statistics_of_all_devices_take_collectives():
    """Three BatchNorms of 8 channels: sums of x and x**2; those behind are gradients anyhow."""
    found, params = collectives()
    assert {each.kind for each in found} == {"all-reduce"}
    assert sum(each.bytes for each in found) == 4 * (params + 2) + 3 * 8 * 4 * 2
    assert sum(each.count for each in found) == 1 + 3 * 2


@pytest.mark.slow
def test_a_mesh_that_divides_parameters_has_no_collective_of_statistics():
    """Among all eight devices there is one reduction, of what is not divided."""
    mesh = ("mesh.fsdp", "2")
    among_all = {
        name: sum(each.count for each in collectives(mesh, *choice)[0] if each.group_size == 8)
        for name, choice in {"global": (), "device": (DEVICE,)}.items()
    }
    assert among_all["device"] == 1
    assert among_all["global"] == 6
    assert plan(mesh, DEVICE).state.batch_stats["stem"]["norm"]["mean"].shape == (8, 8)


def test_a_step_on_eight_devices_is_that_of_eight_networks():
    """Each sees two images; the oracle has their statistics, and the slope of the mean loss."""
    made = plan(DEVICE, *PLAIN, ("optimizer.learning_rate", "1"))
    start = jax.device_get(made.make_state())
    end, sums = train(made, 1)
    end = jax.device_get(end)
    (batch,) = batches(1)
    data = made.config.data
    images = (batch["image"].astype(np.float64) / 255 - data.mean[0]) / data.std[0]
    arguments = {"stage_sizes": (1,), "width": 8, "stem": "medium", "block": "residual"}
    once = jax.tree.map(lambda leaf: leaf[0], start.batch_stats)

    def forward(params):
        results = [
            oracles.modern_cnn(
                images[2 * i : 2 * i + 2], params, once, train=True, variant="standard", **arguments
            )
            for i in range(8)
        ]
        losses = oracles.cross_entropy(
            np.concatenate([logits for logits, _ in results]),
            batch["label"],
            label_smoothing=made.config.loss.label_smoothing,
        )
        return losses, [statistics for _, statistics in results]

    losses, statistics = forward(start.params)
    np.testing.assert_allclose(sums["loss"], losses.sum(), rtol=1e-5)
    rows = jax.tree.map(lambda *each: np.stack(each), *statistics)
    rows = {name: rows[name] for name in end.batch_stats}
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5),
        end.batch_stats,
        rows,
    )
    assert np.ptp(end.batch_stats["stem"]["norm"]["mean"], axis=0).max() > 1e-3, "not alike"

    gradient = jax.tree.map(lambda a, b: a.astype(np.float64) - b, start.params, end.params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    far, near = (
        forward(jax.tree.map(lambda p, g, h=h: p + h * g / norm, start.params, gradient))[0]
        for h in (1e-6, -1e-6)
    )
    np.testing.assert_allclose(norm, (far.mean() - near.mean()) / 2e-6, rtol=1e-3)
    np.testing.assert_allclose(sums["grad_norm"], norm, rtol=1e-3)


def test_groups_are_the_same_on_any_devices():
    """`device` on eight, whole groups on one, and groups that lie on two devices each."""
    runs = [
        train(plan(DEVICE, *PLAIN), 3)[0],
        train(plan(("batch_norm.statistics", "group:2"), *PLAIN, devices=1), 3)[0],
    ]
    first, second = (jax.device_get(run) for run in runs)
    for ours, theirs in zip(
        jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    means = pool_statistics(first.batch_stats)["stem"]["norm"]["mean"]
    np.testing.assert_allclose(means, second.batch_stats["stem"]["norm"]["mean"], atol=1e-4)


@pytest.mark.slow
def test_groups_may_lie_on_several_devices():
    choice = ("batch_norm.statistics", "group:8")
    on_eight, on_one = (
        jax.device_get(train(plan(choice, *PLAIN, devices=devices), 3)[0]) for devices in (8, 1)
    )
    assert on_eight.batch_stats["stem"]["norm"]["mean"].shape == (8,)
    for name in ("params", "batch_stats"):
        for ours, theirs in zip(
            *(jax.tree.leaves(getattr(each, name)) for each in (on_eight, on_one)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_frozen_statistics_have_no_rows_and_take_no_collective():
    choices = (DEVICE, ("train_only", "head,stage1_block1"))
    made = plan(*choices)
    assert made.state.batch_stats["stem"]["norm"]["var"].shape == (8,)
    assert made.state.batch_stats["stage1_block1"]["conv1"]["norm"]["var"].shape == (8, 8)
    found, params = collectives(*choices)
    stem = sum(leaf.size for leaf in jax.tree.leaves(made.state.params["stem"]))
    assert sum(each.bytes for each in found) == 4 * (params - stem + 2)


def some_rows(shape_of):
    """Statistics of the structure of a plan's, every number different."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.device_put(
            rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), leaf.sharding
        ),
        shape_of,
    )


def pooled_by_hand(tree):
    """By second moments in float64."""
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    pooled = {}
    for name in leaves:
        if name.endswith("['mean']"):
            variance = name.replace("['mean']", "['var']")
            moments = leaves[variance] + leaves[name] ** 2
            pooled[name] = leaves[name].mean(axis=0)
            pooled[variance] = moments.mean(axis=0) - pooled[name] ** 2
    return pooled


def assert_equal(tree, expected, rows=None):
    leaves = jax.tree.leaves_with_path(tree)
    assert {jax.tree_util.keystr(path) for path, _ in leaves} == expected.keys()
    for path, leaf in leaves:
        for row in [leaf] if rows is None else leaf:
            np.testing.assert_allclose(row, expected[jax.tree_util.keystr(path)], rtol=1e-5)
        assert rows is None or leaf.shape[0] == rows


def test_a_checkpoint_goes_on_with_another_number_of_devices(tmp_path):
    made = plan(DEVICE)
    state = made.make_state()
    state = state.replace(batch_stats=some_rows(made.state.batch_stats))
    expected = pooled_by_hand(state.batch_stats)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, log=print)
    checkpoints.save(state, record={})
    checkpoints.wait()

    same = checkpoints.restore(made.state)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    for other, rows in (
        (plan(DEVICE, devices=2), 2),
        (plan(DEVICE, devices=1), None),
        (plan(("mesh.fsdp", "4")), None),
    ):
        restored = checkpoints.restore(other.state)
        assert_equal(restored.batch_stats, expected, rows)
        assert jax.tree.all(
            jax.tree.map(
                lambda ours, asked: ours.sharding.is_equivalent_to(asked.sharding, ours.ndim),
                restored,
                other.state,
            )
        )
        jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    checkpoints.close()

    variables, _ = read_directory(tmp_path)
    assert_equal(variables["batch_stats"], expected)


def test_a_checkpoint_without_rows_is_spread(tmp_path):
    made = plan()
    state = made.make_state()
    checkpoints = Checkpoints(tmp_path, keep=1, log=print)
    checkpoints.save(state, record={})
    checkpoints.wait()
    restored = checkpoints.restore(plan(DEVICE).state)
    checkpoints.close()
    jax.tree.map(
        lambda rows, leaf: np.testing.assert_array_equal(rows, np.tile(leaf, (8, 1))),
        restored.batch_stats,
        state.batch_stats,
    )


def test_evaluation_and_exported_weights_agree():
    """The step pools the rows itself, with what the pooled statistics give."""
    made = plan(DEVICE)
    state = made.make_state()
    state = state.replace(batch_stats=some_rows(made.state.batch_stats))
    (batch,) = batches(1)
    step = jax.jit(made.eval_step)
    batch["mask"] = np.ones(16, np.float32)
    sums = step(state, batch)
    whole = pool_statistics(jax.device_get(state.batch_stats))
    np.testing.assert_allclose(
        sums["loss"], step(state.replace(batch_stats=whole), batch)["loss"], rtol=1e-5
    )


def test_spread_and_pooled_statistics_are_the_same():
    plain = {"norm": {"mean": np.arange(3.0), "var": np.arange(3.0) + 1}}
    spread = jax.device_get(spread_statistics(plain, 4))
    assert spread["norm"]["mean"].shape == (4, 3)
    jax.tree.map(np.testing.assert_array_equal, pool_statistics(spread), plain)
    jax.tree.map(np.testing.assert_array_equal, pool_statistics(plain), plain)
