"""The file of `python -m cnn_jax export` in Triton's Python backend.

    cp clothes.zip launch/triton/clothes/1/model.zip
    tritonserver --model-repository launch/triton

Triton's Python needs jax and flatbuffers, not cnn_jax. Images are decoded by the client, as
"preprocessing" in the file's model.json says.
"""

import json
import zipfile
from pathlib import Path

import jax
import jax.export
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Answers with probabilities [batch, classes] for uint8 images [batch, h, w, c]."""

    def initialize(self, args):
        """Compiles the function for batches of 1, 2, 4, ... images, and of the largest size."""
        with zipfile.ZipFile(Path(__file__).with_name("model.zip")) as file:
            about = json.loads(file.read("model.json"))
            exported = jax.export.deserialize(bytearray(file.read("model.stablehlo")))
        options = about["compiler_options"].get(jax.default_backend(), {})
        self._predict = jax.jit(exported.call, compiler_options=options)
        largest = max(1, json.loads(args["model_config"])["max_batch_size"])
        self._sizes = [*(2**k for k in range((largest - 1).bit_length())), largest]
        for size in self._sizes:
            self._predict(np.zeros((size, *about["input"]["shape"][1:]), np.uint8))

    def execute(self, requests):
        """Returns a response for each request; Triton gives as many as make a batch."""
        images = [pb_utils.get_input_tensor_by_name(each, "images").as_numpy() for each in requests]
        together = np.concatenate(images)
        size = next(size for size in self._sizes if size >= len(together))
        batch = np.zeros((size, *together.shape[1:]), np.uint8)
        batch[: len(together)] = together
        rows = np.asarray(self._predict(batch))
        ends = np.cumsum([len(each) for each in images])
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("probabilities", rows[end - len(each) : end])]
            )
            for each, end in zip(images, ends, strict=True)
        ]
