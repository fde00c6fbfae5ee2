"""Time to 94 % of Fashion-MNIST on this machine: this package and PyTorch, in turn.

    python benchmarks/time_to_accuracy.py
    python benchmarks/time_to_accuracy.py --config configs/fashion_mnist_94.py --seeds 3 \
        --config.data.source_dir=DIR

Both train the same network from the same first weights with the same recipe: batch size, learning
rate of every step, decay, label smoothing, flips, shifts, an evaluation an epoch. PyTorch runs on
the CPU in channels_last, its images normalised beforehand, compiled by torch.compile if some steps
are quicker so. The time is that from the command to the end of the process, all programs compiled
in it or read from the cache that either library keeps; the accuracy is that of the last epoch.

Every run that has ended is kept in benchmarks/results/time_to_accuracy.json at once: the same
command goes on with the next. The aim: mean accuracy >= 0.94 for both, ours in <= 1.0 of the time.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "time_to_accuracy.json"
TRIAL_STEPS = 20


def write_task(path: Path, config: Path, texts: list[tuple[str, str]], seed: int) -> None:
    """Writes all that PyTorch needs of a run: images, first weights, learning rates, choices.

    Raises SystemExit for a recipe that `Network` or `train_in_torch` does not have.
    """
    import jax

    from cnn_jax.cli.config_files import load
    from cnn_jax.config import override, parse
    from cnn_jax.data.sources import open_source
    from cnn_jax.models.torch_weights import to_torch
    from cnn_jax.plan import make_plan, source_options

    values = override(load(config), [*texts, ("seed", str(seed))])
    plan = make_plan(parse(values, num_devices=1), devices=jax.devices()[:1])
    chosen = plan.config
    unknown = {
        "model.name": chosen.model.name != "resnet_mini",
        "optimizer.name": chosen.optimizer.name != "sgd",
        "loss.name": chosen.loss.name != "cross_entropy",
        "ema.decay": chosen.ema.decay,
        "data.progressive_sizes": chosen.data.progressive_sizes,
        "augment": chosen.augment.random_operations or chosen.augment.erase_probability,
    }
    if any(unknown.values()):
        names = ", ".join(name for name, value in unknown.items() if value)
        sys.exit(f"{config}: the PyTorch side of this benchmark does not have its {names}")
    state = jax.device_get(plan.make_state())
    arrays = to_torch({"params": state.params, "batch_stats": state.batch_stats})
    facts = {
        "model": dict(chosen.model.arguments),
        "batch_size": chosen.batch_size,
        "epochs": chosen.num_epochs,
        "seed": seed,
        "momentum": chosen.optimizer.momentum,
        "nesterov": chosen.optimizer.nesterov,
        "weight_decay": chosen.optimizer.weight_decay,
        "label_smoothing": chosen.loss.label_smoothing,
        "flip": chosen.augment.flip,
        "alternate_flips": chosen.augment.alternate_flips,
        "crop_padding": chosen.augment.crop_padding,
        "average_flips": chosen.eval.average_flips,
        "mean": chosen.data.mean,
        "std": chosen.data.std,
    }
    rates = [plan.learning_rate(step) for step in range(plan.total_steps)]
    sets = {}
    for name, part in chosen.data.parts().items():
        source = open_source(chosen.data.name, **part, **source_options(chosen))
        batch = source.batch(np.arange(len(source)))
        sets |= {f"{name}_images": batch["image"], f"{name}_labels": batch["label"]}
    np.savez(path, facts=json.dumps(facts), rates=rates, **sets, **prefixed("weights/", arrays))


def prefixed(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def train_in_torch(task: Path, mode: str, report: Path) -> None:
    """Trains as the task says, eager or compiled; with `mode` "trial" times some steps of both."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.downsample = None
            if stride > 1 or inputs != outputs:
                self.downsample = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    class Network(nn.Module):
        def __init__(self, channels: int, width: int, stem: str, stages: list[int]) -> None:
            super().__init__()
            stride = {"medium": 2, "small": 1}[stem]
            self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            inputs = width
            for stage, size in enumerate(stages):
                blocks = []
                for number in range(size):
                    outputs = width * 2**stage
                    blocks.append(Block(inputs, outputs, 2 if stage and not number else 1))
                    inputs = outputs
                self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.stages = len(stages)
            self.fc = nn.Linear(inputs, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.bn1(self.conv1(x)))
            for stage in range(self.stages):
                x = self.get_submodule(f"layer{stage + 1}")(x)
            return self.fc(x.mean((2, 3)))

    with np.load(task) as file:
        stored = dict(file)
    facts, rates = json.loads(str(stored["facts"])), stored["rates"].tolist()
    torch.manual_seed(facts["seed"])
    scale = [1 / (255 * each) for each in facts["std"]]
    offset = [mean / std for mean, std in zip(facts["mean"], facts["std"], strict=True)]

    def prepared(images: np.ndarray) -> Tensor:
        floats = torch.from_numpy(images).float() * torch.tensor(scale) - torch.tensor(offset)
        return floats.permute(0, 3, 1, 2)  # a view, so channels last

    images, labels = prepared(stored["train_images"]), torch.from_numpy(stored["train_labels"])
    tests, answers = prepared(stored["test_images"]), torch.from_numpy(stored["test_labels"])
    labels, answers = labels.long(), answers.long()
    zeros = -torch.tensor(offset)[:, None, None]
    first_side = torch.rand(len(images)) < 0.5

    def augmented(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        padding = facts["crop_padding"]
        if padding:
            height, width = x.shape[2:]
            padded = functional.pad(x - zeros, [padding] * 4) + zeros
            top, left = torch.randint(0, 2 * padding + 1, (2, len(x), 1))
            rows, columns = top + torch.arange(height), left + torch.arange(width)
            number = torch.arange(len(x))[:, None, None]
            x = padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]]
            x = x.permute(0, 3, 1, 2)
        if facts["flip"] or facts["alternate_flips"]:
            chance = torch.rand(len(x)) < 0.5
            flip = first_side[index] ^ (epoch % 2 == 1) if facts["alternate_flips"] else chance
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
        return x

    def made(compiled: bool) -> Any:
        arguments = facts["model"]
        network = Network(
            images.shape[1],
            arguments.get("width", 16),
            arguments.get("stem", "small"),
            list(arguments.get("stage_sizes", (1, 1, 1))),
        )
        start = len("weights/")
        network.load_state_dict(
            {
                name[start:]: torch.from_numpy(array)
                for name, array in stored.items()
                if name.startswith("weights/")
            }
        )
        network.to(memory_format=torch.channels_last)
        decayed = [each for each in network.parameters() if each.ndim > 1]
        others = [each for each in network.parameters() if each.ndim <= 1]
        optimizer = torch.optim.SGD(
            [
                {"params": decayed, "weight_decay": facts["weight_decay"]},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=0.0,
            momentum=facts["momentum"],
            nesterov=facts["nesterov"],
        )
        return (torch.compile(network) if compiled else network), optimizer

    def step(network: Any, optimizer: Any, index: Tensor, epoch: int, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = network(augmented(images[index], index, epoch))
        loss = functional.cross_entropy(
            logits, labels[index], label_smoothing=facts["label_smoothing"]
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    if mode == "trial":
        seconds = {}
        for name in ("eager", "compiled"):
            network, optimizer = made(name == "compiled")
            network.train()
            try:
                for number in range(2 * TRIAL_STEPS):
                    if number == TRIAL_STEPS:
                        began = time.perf_counter()
                    index = torch.randint(len(images), (facts["batch_size"],))
                    step(network, optimizer, index, 0, 0.001)
                seconds[name] = (time.perf_counter() - began) / TRIAL_STEPS
            except Exception as error:  # torch.compile needs a C++ compiler, and more
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        report.write_text(json.dumps(seconds))
        return

    network, optimizer = made(mode == "compiled")
    size, done, accuracies = facts["batch_size"], 0, []
    left = torch.empty(0, dtype=torch.long)
    for epoch in range(facts["epochs"]):
        network.train()
        order = torch.cat([left, torch.randperm(len(images))])  # nothing is dropped
        whole = len(order) // size * size
        for index in order[:whole].split(size):
            step(network, optimizer, index, epoch, rates[done])
            done += 1
        left = order[whole:]
        network.eval()
        right = 0
        with torch.inference_mode():
            for x, y in zip(tests.split(1000), answers.split(1000), strict=True):
                logits = network(x) + (network(x.flip(3)) if facts["average_flips"] else 0)
                right += int((logits.argmax(1) == y).sum())
        accuracies.append(right / len(answers))
        print(f"epoch {epoch + 1}  test accuracy {accuracies[-1]:.4f}", flush=True)
    report.write_text(json.dumps({"test_accuracy": accuracies[-1], "steps": done}))


def run(command: list[str], report: Path) -> tuple[float, dict[str, Any]]:
    """Returns the seconds that a command took, and what it wrote."""
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    return time.perf_counter() - began, json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/fashion_mnist_94.py"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--torch", nargs=3, metavar=("TASK", "MODE", "REPORT"), help="one run")
    if "--torch" in sys.argv:
        task, mode, report = parser.parse_args().torch
        return train_in_torch(Path(task), mode, Path(report))

    from seeds import processor

    from cnn_jax.cli.config_files import split_overrides
    from cnn_jax.runtime.platform import versions

    flags, texts = split_overrides(sys.argv[1:])
    options = parser.parse_args(flags)
    recipe = " ".join([str(options.config), *(f"--config.{key}={text}" for key, text in texts)])
    result = {
        "command": f"python benchmarks/time_to_accuracy.py --config {recipe}",
        "machine": f"{os.cpu_count()} cores of {processor()}, {platform.system()}",
        "versions": versions() | {"torch": _version_of_torch()},
        "runs": [],
    }
    if options.output.exists():
        before = json.loads(options.output.read_text())
        changed = [key for key in ("command", "machine", "versions") if before[key] != result[key]]
        if changed:
            sys.exit(f"{options.output} is of another {', '.join(changed)}; move it away first")
        result = before

    def keep() -> None:
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")

    done = {(each["side"], each["seed"]) for each in result["runs"]}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            if {("ours", seed), ("torch", seed)} <= done:
                continue
            workdir, task, report = (Path(folder, f"{seed}{end}") for end in ("", ".npz", ".json"))
            write_task(task, options.config, texts, seed)
            child = [sys.executable, __file__, "--torch", str(task)]
            if "torch_seconds_a_step" not in result:
                _, result["torch_seconds_a_step"] = run([*child, "trial", str(report)], report)
                keep()
            trial = result["torch_seconds_a_step"]
            ours = [sys.executable, "train.py", f"--config={options.config}"]
            ours += [f"--config.{key}={text}" for key, text in texts]
            ours += [f"--config.seed={seed}", f"--workdir={workdir}"]
            sides = {
                "ours": (ours, workdir / "summary.json", "test/accuracy"),
                "torch": (
                    [*child, min(trial, key=trial.get), str(report)],
                    report,
                    "test_accuracy",
                ),
            }
            for side in sides if seed % 2 == 0 else reversed(sides):
                if (side, seed) in done:
                    continue
                command, written, name = sides[side]
                seconds, answer = run(command, written)
                row = {"side": side, "seed": seed, "test_accuracy": answer[name]}
                result["runs"].append(row | {"seconds": round(seconds, 1)})
                keep()
    for side in ("ours", "torch"):
        rows = [row for row in result["runs"] if row["side"] == side]
        result[side] = {
            name: round(statistics.mean(row[name] for row in rows), 4)
            for name in ("test_accuracy", "seconds")
        }
    result["ours_by_torch"] = round(result["ours"]["seconds"] / result["torch"]["seconds"], 3)
    keep()
    print(json.dumps(result, indent=2))


def _version_of_torch() -> str:
    import importlib.metadata

    return importlib.metadata.version("torch")


if __name__ == "__main__":
    main()
