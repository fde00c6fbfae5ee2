"""The side that runs on PyTorch, eager or compiled, channels last.

Only the process of that peer imports this module, and PyTorch with it.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cnn_jax.benchmarking.machine import num_cores, told
from cnn_jax.benchmarking.torch_resnet import make_resnet
from cnn_jax.benchmarking.workload import (
    LEARNING_RATE,
    MEAN,
    MOMENTUM,
    STD,
    WEIGHT_DECAY,
    Workload,
    architecture,
)


class TorchSide:
    """One network as PyTorch runs it.

    Attributes:
      facts: what is known of it before it runs, for JSON.
    """

    def __init__(self, name: str, workload: Workload, folder: Path) -> None:
        """Takes the weights in `folder`; compiles, and for that runs once, where `name` says so."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(num_cores())
        torch.backends.cudnn.benchmark = True
        # What JAX's default precision is too, on the cards that have it.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self._workload = workload
        batch = workload.make_batch()
        # [b h w c] in memory seen as [b c h w] is what PyTorch calls channels last.
        self._images = torch.from_numpy(batch["image"]).to(self._device).permute(0, 3, 1, 2)
        self._labels = torch.from_numpy(batch["label"]).long().to(self._device)
        with np.load(folder / "weights.npz") as arrays:
            tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        network = make_resnet(architecture(workload), tensors).to(self._device)
        network.train(workload.training)
        decayed = [x for x in network.parameters() if x.ndim > 1]
        others = [x for x in network.parameters() if x.ndim <= 1]
        self._optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others}],
            lr=LEARNING_RATE,
            momentum=MOMENTUM,
            nesterov=True,
            fused=True,
        )
        self._network: Any = network
        compiling = 0.0
        if name == "torch-compile":
            self._network = torch.compile(network)
            start = time.perf_counter()
            self._compile(network)
            compiling = time.perf_counter() - start
        self.facts = {
            "parameters": sum(x.numel() for x in network.parameters()),
            "versions": {"torch": torch.__version__},
            "flags": told("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_BLOCKTIME", "GLIBC_TUNABLES"),
            "threads": torch.get_num_threads(),
            "platform": {"cuda": "gpu", "cpu": "cpu"}[self._device.type],
            "compile_seconds": {"compiling": compiling},
        }

    def results(self, count: int) -> list[Any]:
        """Returns what so many steps give, one after the other: losses, or logits."""
        return [self._once().float().cpu().numpy().tolist() for _ in range(count)]

    def window(self, count: int) -> float:
        """Returns the seconds that so many steps take, until the last of them is done."""
        self._synchronize()
        start = time.perf_counter()
        for _ in range(count):
            self._once()
        self._synchronize()
        return time.perf_counter() - start

    def _compile(self, network: torch.nn.Module) -> None:
        """Runs once, which compiles both passes, and leaves the network as it was."""
        before = {name: x.clone() for name, x in network.state_dict().items()}
        if self._workload.training:
            self._loss().backward()
            self._optimizer.zero_grad()
        else:
            self._once()
        self._synchronize()
        network.load_state_dict(before)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _logits(self) -> Tensor:
        dtype = torch.bfloat16 if self._workload.precision == "bfloat16" else None
        images = (self._images.float() / 255 - MEAN) / STD
        with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None):
            return self._network(images)

    def _loss(self) -> Tensor:
        return functional.cross_entropy(self._logits().float(), self._labels)

    def _once(self) -> Tensor:
        if not self._workload.training:
            with torch.inference_mode():
                return self._logits()
        loss = self._loss()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()
