"""The file of `python -m cnn_jax export` on a cluster of Ray, with its batching and its queue.

    MODEL=clothes.zip serve run launch.ray_serve:application
    curl --data-binary @shoe.png http://127.0.0.1:8000/

It needs ray[serve] beside cnn_jax. On CPUs alone: CNN_JAX_GPUS=0. Ray's proxy does not limit the
size of a body: something in front of it must.
"""

import asyncio
import os

import numpy as np
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from cnn_jax.data.image_files import decode_image
from cnn_jax.data.images import ImageError
from cnn_jax.serving.batching import batch_sizes, padded
from cnn_jax.serving.network import network_of_file
from cnn_jax.trained import most_probable

MAX_BATCH = 32


@serve.deployment(
    ray_actor_options={"num_gpus": float(os.environ.get("CNN_JAX_GPUS", "1"))},
    max_ongoing_requests=2 * MAX_BATCH,
    max_queued_requests=8 * MAX_BATCH,
    autoscaling_config={"min_replicas": 1, "max_replicas": 8},
)
class Network:
    """Answers an image with its most probable classes."""

    def __init__(self, path: str) -> None:
        self._network = network_of_file(path)
        self._programs = {size: self._network.compile(size) for size in batch_sizes(MAX_BATCH)}

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.005)
    async def probabilities(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Returns a row for each image; Ray calls it with those that wait."""
        return await asyncio.to_thread(padded, self._programs, images)

    async def __call__(self, request: Request) -> JSONResponse:
        """Returns the five most probable classes, or status 400 with what is wrong."""
        data, network = await request.body(), self._network
        how = {"fraction": network.eval_fraction, "max_pixels": 50_000_000}
        try:
            image = await asyncio.to_thread(decode_image, data, network.image_shape, **how)
        except ImageError as error:
            return JSONResponse({"error": f"the file cannot be read: {error}"}, status_code=400)
        row = await self.probabilities(image)
        best = most_probable(row, self._network.class_names, 5)
        return JSONResponse({"classes": [{"class": c, "probability": p} for c, p in best]})


application = Network.bind(os.path.abspath(os.environ["MODEL"]))
