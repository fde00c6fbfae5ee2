"""Compiling one step in a process of its own: a request on standard input, a report in a file.

`commands.compile` starts it, with the environment that the topology needs: a compiler that
crashes takes nothing else with it.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from cnn_jax.config import parse
from cnn_jax.errors import UserError
from cnn_jax.models.geometry import layers, total
from cnn_jax.plan import Plan, choices, is_training, make_plan
from cnn_jax.runtime import executables, hlo
from cnn_jax.runtime.compile_plot import plot
from cnn_jax.runtime.compiler import compile_program
from cnn_jax.runtime.platform import versions
from cnn_jax.runtime.roofline import Estimate, Rates, estimate
from cnn_jax.runtime.topologies import Topology, parse_topology
from cnn_jax.storage import write_atomically

SECONDS_PER_LAUNCH = {"cuda": 2e-6, "tpu": 0.0}
"""Between two kernels: a GPU waits for the next launch, a TPU runs one program."""


def main() -> int:
    """Compiles what the request asks for; returns 0, or 1 with the error in the report."""
    request = json.load(sys.stdin)
    threading.Thread(target=_end_with, args=[request["parent"]], daemon=True).start()
    report = Path(request["report"])
    try:
        answer = compile_step(request)
    except UserError as error:
        answer = {"error": str(error)}
    except Exception as error:  # a compiler's own, of any kind
        answer = {"error": f"{type(error).__name__}: {_first_lines(str(error))}"}
    write_atomically(report, json.dumps(answer))
    return 1 if "error" in answer else 0


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, in whichever way."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def compile_step(request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the report of one step on one topology.

    Raises UserError where configuration and topology do not go together, and whatever the compiler
    raises.
    """
    topology = parse_topology(request["topology"])
    config = parse(request["config"], num_devices=topology.num_devices)
    plan = make_plan(config, devices=topology.devices())
    step = request["step"]

    start = time.perf_counter()
    lowered = plan.lower(step)
    lowering = time.perf_counter() - start
    dump = Path(request["dump"]) if request["dump"] else None
    if dump:
        write_atomically(dump / f"{request['label']}.stablehlo.txt", lowered.as_text())
    start = time.perf_counter()
    compiled = compile_program(lowered, plan.compiler.options)
    compiling = time.perf_counter() - start
    saved = None
    if request["save"]:
        saved = executables.save(
            Path(request["save"]), step, compiled, plan.conditions(step, lowered)
        )
    text = compiled.as_text() or ""
    if dump:
        write_atomically(dump / f"{request['label']}.hlo.txt", text)
    program = hlo.read(text)
    kernels = hlo.kernels(program)
    images = plan.batch_size(step)
    share = images / topology.num_devices
    costs = compiled.cost_analysis() or {}
    counted = hlo.flops(program)
    expected = _estimate(kernels, topology, images)
    if request["plot"]:
        path = Path(request["plot"]) / f"{request['label']}.png"
        plot(path, request["label"], program, kernels, expected and expected.rates)
    return {
        "batch": images,
        "devices": topology.num_devices,
        "precision": config.precision,
        "choices": choices(config) if is_training(step) else {},
        "compiler": plan.compiler.describe(),
        "memory": _memory(compiled, topology),
        "flops_per_image": {
            # Taps on the padding count in this one alone, what `remat` computes again does not.
            "geometry": _geometry(plan, step),
            "compiler": _an_image(costs.get("flops"), share),
            "hlo": counted.total / share,
        },
        "bytes_per_image": {
            # Where a fusion gathers some of the resident images, the compiler counts all of them.
            "compiler": None
            if plan.resident and is_training(step)
            else _an_image(costs.get("bytes accessed"), share),
            "hlo": hlo.traffic(program).total / share,
        },
        "kernels": hlo.launches(program),
        "loops_of_unknown_length": list(hlo.unknown_loops(program)),
        "collectives": [
            {
                "kind": each.kind,
                "count": each.count,
                "bytes": each.bytes,
                "group_size": each.group_size,
                "sent_bytes": each.sent_bytes,
            }
            for each in hlo.collectives(program)
        ],
        "float32_activations": _float32(program) if config.precision == "bfloat16" else [],
        "estimate": expected and _as_json(expected),
        "saved": saved and str(saved),
        "seconds": {"lowering": lowering, "compiling": compiling},
        "versions": versions(),
    }


def _memory(compiled: Any, topology: Topology) -> dict[str, Any]:
    """Returns bytes of one device, and whether they fit."""
    found = compiled.memory_analysis()
    arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes
    aliased, temporaries = found.alias_size_in_bytes, found.temp_size_in_bytes
    code = found.generated_code_size_in_bytes
    peak = arguments + outputs - aliased + temporaries + code
    capacity = topology.accelerator.memory
    return {
        "arguments": arguments,
        "outputs": outputs,
        "aliased": aliased,
        "temporaries": temporaries,
        "code": code,
        "peak": peak,
        "capacity": capacity,
        "fits": None if capacity is None else peak <= capacity,
    }


def _geometry(plan: Plan, step: str) -> float | None:
    """Returns the floating-point operations of a step for one image, by the layers' formulas."""
    multiply_adds = total(layers(plan.model, plan.image_shape(step))).multiply_adds
    passes = 3 if is_training(step) else 1  # a backward pass is worth two forward ones
    return None if multiply_adds is None else 2.0 * multiply_adds * passes


def _an_image(count: float | None, images: float) -> float | None:
    """Returns the compiler's own count an image; None where it has none or an impossible one."""
    return count / images if count is not None and count > 0 else None


def _float32(program: hlo.Program, most: int = 5) -> list[dict[str, Any]]:
    """Returns the largest float32 arrays that the step makes, and where in the source.

    One as large as a float32 argument is taken for that parameter, copied or turned over.
    """
    buffers = hlo.liveness(program).buffers
    exact = [each for each in buffers if each.dtype == "f32"]
    sizes = {each.bytes for each in exact if each.kind == "arguments"}
    alive = [each for each in buffers if each.kind == "activations"]
    large = sorted(
        (each for each in exact if each.kind == "activations" and each.bytes not in sizes),
        key=lambda each: -each.bytes,
    )
    least = 0.01 * max((each.bytes for each in alive), default=0)
    return [
        {
            "shape": list(each.array.dims),
            "bytes": each.bytes,
            "layer": each.op_name,
            "source": _source(each.frames),
        }
        for each in large[:most]
        if each.bytes >= max(least, 2**20)
    ]


def _source(frames: Iterable[hlo.Frame]) -> str:
    """Returns the innermost line that is not a library's."""
    places = [f"{frame.file}:{frame.line}" for frame in frames]
    own = [place for place in places if "site-packages" not in place]
    return (own or places or [""])[0]


def _estimate(kernels: tuple[hlo.Kernel, ...], topology: Topology, images: int) -> Estimate | None:
    """Returns the roofline estimate; None without published rates of the device."""
    accelerator = topology.accelerator
    rates = {
        "bf16": accelerator.bfloat16_rate,
        "f16": accelerator.float16_rate,
        "f32": accelerator.float32_rate,
    }
    known = {dtype: rate for dtype, rate in rates.items() if rate}
    if not known or not accelerator.memory_bandwidth or not kernels:
        return None
    return estimate(
        kernels,
        Rates(
            flops_per_second=known,
            memory_bytes_per_second=accelerator.memory_bandwidth,
            link_bytes_per_second=(accelerator.link_bandwidth or 0) * topology.links or 1.0,
            seconds_per_launch=SECONDS_PER_LAUNCH[topology.platform],
        ),
        images=images,
        devices=topology.num_devices,
    )


def _as_json(expected: Estimate) -> dict[str, Any]:
    return {
        "step_seconds": expected.step_seconds,
        "images_per_second": expected.images_per_second,
        "images_per_second_per_device": expected.images_per_second_per_device,
        "bound": expected.bound,
        "seconds": dict(expected.seconds),
        "assumptions": {
            "matrix_efficiency": expected.assumptions.matrix_efficiency,
            "memory_efficiency": expected.assumptions.memory_efficiency,
            "link_efficiency": expected.assumptions.link_efficiency,
            "seconds_per_launch": expected.rates.seconds_per_launch,
        },
    }


def _first_lines(text: str, most: int = 600) -> str:
    return text.strip()[:most]


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # the time of a compile is reported
    sys.exit(main())
