"""The peers are the same network: equal logits from equal weights, in both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax.benchmarking.linen_resnet import plain_network, plain_variables
from cnn_jax.benchmarking.workload import Architecture, Workload, architecture
from cnn_jax.models.torch_weights import to_torch

CASES = {
    ("large", "bottleneck"): (32, 32, 3),
    ("medium", "residual"): (16, 16, 1),
    ("small", "bottleneck"): (8, 8, 3),
}


@pytest.fixture(params=CASES, ids="-".join)
def case(request) -> tuple[Workload, Architecture, dict, np.ndarray]:
    """A workload, its architecture, variables with running statistics, and images."""
    stem, block = request.param
    arguments = {"stem": stem, "block": block, "width": 4, "stage_sizes": (1, 2)}
    workload = Workload("resnet_mini", arguments, 5, CASES[request.param], 2, "float32", True)
    rng = np.random.default_rng(0)
    images = rng.normal(0, 1, (2, *workload.image_shape)).astype(np.float32)
    model = workload.make_model()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    leaves = {
        path: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        if path[-1] in ("var", "scale")
        else rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        for path, leaf in flatten_dict(shapes).items()
    }
    return workload, architecture(workload), unflatten_dict(leaves), images


def expected(workload: Workload, variables: dict, images: np.ndarray) -> np.ndarray:
    return np.asarray(workload.make_model().apply(variables, images, train=False))


def test_linen(case):
    workload, of, variables, images = case
    peer = plain_network(of, jnp.float32)
    found = peer.apply(plain_variables(variables, of.stage_sizes), images, train=False)
    np.testing.assert_allclose(found, expected(workload, variables, images), rtol=1e-4, atol=1e-5)


def test_torch(case):
    torch = pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[parity]"')
    from cnn_jax.benchmarking.torch_resnet import make_resnet

    workload, of, variables, images = case
    tensors = {name: torch.from_numpy(x) for name, x in to_torch(variables).items()}
    peer = make_resnet(of, tensors).eval()
    with torch.inference_mode():
        found = peer(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(found, expected(workload, variables, images), rtol=1e-4, atol=1e-5)
