"""One run of a case in PyTorch: what `comparison.run_flax` must give."""

import numpy as np
import torch
import torch_models
from parity_cases import (
    LABEL_SMOOTHING,
    MOMENTUM,
    NUM_CLASSES,
    RATES,
    WEIGHT_DECAY,
    Case,
)
from torch.nn import functional

torch.set_num_threads(1)  # these networks are small, and JAX has threads of its own


def make_model(case: Case, norm: str, dtype: torch.dtype) -> torch.nn.Module:
    """The network with the drawn weights."""
    model = case.torch(torch_models, norm).to(dtype)
    tensors = {name: torch.from_numpy(x) for name, x in case.draw_tensors().items()}
    counters = {name: x for name, x in model.state_dict().items() if x.dtype == torch.int64}
    model.load_state_dict(tensors | counters, strict=True)
    return model


def make_batches(case: Case, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.from_numpy(images).movedim(-1, 1).to(dtype), torch.from_numpy(labels).long())
        for images, labels in case.draw_batches()
    ]


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)


def train(model: torch.nn.Module, batches) -> None:
    """Five steps of SGD as `docs/parity.md` describes them; only arrays of two axes decay."""
    model.train()
    parameters = dict(model.named_parameters())
    # A layer scale is (C, 1, 1) in PyTorch and a vector in Flax.
    decays = {
        name: x.ndim > 1 and not name.endswith("layer_scale") for name, x in parameters.items()
    }
    groups = [
        {"params": [x for name, x in parameters.items() if decays[name] == decay]}
        | {"weight_decay": WEIGHT_DECAY if decay else 0.0}
        for decay in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True)
    for rate, (images, labels) in zip(RATES, batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss_of(model(images), labels).backward()
        optimizer.step()


def run_torch(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """What PyTorch computes in this precision."""
    kind = getattr(torch, dtype)
    batches = make_batches(case, kind)
    images, labels = batches[0]
    run = {}

    model = make_model(case, case.norm, kind).eval()
    with torch.no_grad():
        run["eval/logits"] = model(images)
        run |= {f"eval/stage{index}": x for index, x in enumerate(model.stages(images))}
    assert run["eval/logits"].shape[1] == NUM_CLASSES

    # A chaotic case trains no step in Flax, which is where the first convention shows.
    for norm in case.conventions[-1:] if case.chaotic else case.conventions:
        model = make_model(case, norm, kind).train()
        pixels = images.clone().requires_grad_(True)
        logits = model(pixels)
        loss = loss_of(logits, labels)
        loss.backward()
        run |= {"train/loss": loss, "train/logits": logits, "gradient/images": pixels.grad}
        run |= {f"gradient/{name}": x.grad for name, x in model.named_parameters()}
        for name, x in model.state_dict().items():
            if "running" in name:
                run[f"statistics/{norm}/{name}"] = x

    model = make_model(case, case.norm, kind)
    train(model, batches)
    for name, x in model.state_dict().items():
        if x.is_floating_point():
            run[f"trained/{name}"] = x
    return {name: x.detach().double().numpy() for name, x in run.items()}
