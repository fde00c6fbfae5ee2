"""Counts what a step launches: kernels, bytes, operations and collectives.

Bytes and operations follow the rules of XLA's own `HloCostAnalysis`
(github.com/openxla/xla, xla/service/hlo_cost_analysis.cc), which a GPU compiler without its card
does not run; where a rule differs, the function that differs says so.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, TypeAlias

import numpy as np

from cnn_jax.runtime.hlo.loops import trip_count
from cnn_jax.runtime.hlo.opcodes import (
    COLLECTIVES,
    CUBLAS_PRODUCTS,
    CUDNN_CONVOLUTIONS,
    ELEMENTWISE,
    TRANSCENDENTAL,
    WITHOUT_KERNEL,
    WITHOUT_KERNEL_TARGETS,
)
from cnn_jax.runtime.hlo.text import (
    Array,
    Computation,
    Frame,
    Instruction,
    Program,
    Traced,
    fields,
    integers,
    leaves,
)


@dataclass(frozen=True)
class _Counts:
    """Numbers that are added field by field."""

    def __add__(self, other: Self) -> Self:
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return type(self)(*(a + b for a, b in zip(ours, theirs, strict=True)))

    def __rmul__(self, times: int) -> Self:
        return type(self)(*(times * n for n in dataclasses.astuple(self)))


@dataclass(frozen=True)
class Traffic(_Counts):
    """Bytes that are read and written.

    Attributes:
      read: from the device's main memory.
      written: to the device's main memory.
      on_chip: read from or written to a TPU's on-chip memory.
      host: read from or written to the host's memory.
    """

    read: int = 0
    written: int = 0
    on_chip: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes to and from the device's main memory."""
        return self.read + self.written


@dataclass(frozen=True)
class Flops(_Counts):
    """Operations by kind.

    Attributes:
      matrix: of convolutions and matrix products, 2 for each multiply-add; taps of a convolution
        that fall into the padding or between dilated elements are not counted.
      elementwise: 1 for each element of a result, and for each step of a reduction.
      transcendental: exponentials, roots and the like, 1 for each element.
    """

    matrix: int = 0
    elementwise: int = 0
    transcendental: int = 0

    @property
    def total(self) -> int:
        """`matrix + elementwise`, what XLA reports as "flops"."""
        return self.matrix + self.elementwise


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind.

    Attributes:
      kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `collective-permute` ...
      count: how many of them a step runs.
      bytes: of all of them on one device: the operand or the result, whichever is larger.
      group_size: devices that take part in one.
      asynchronous: whether kernels may run while it does.
    """

    kind: str
    count: int
    bytes: int
    group_size: int
    asynchronous: bool

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends when the group is a ring.

        `2 (n - 1) / n` of an all-reduce, all of a permutation, `(n - 1) / n` of the others.
        """
        share = (self.group_size - 1) / max(self.group_size, 1)
        return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share) * (
            self.bytes
        )


@dataclass(frozen=True)
class Kernel(Traced):
    """Something that the device is told to run.

    Attributes:
      name: of the instruction.
      kind: its opcode; of a fusion its kind, of a custom call its target.
      op_name: the path of the layer and operation in JAX.
      frames: where in Python it was traced, innermost call first.
      times: how often a step launches it; the numbers below are of one launch.
      matrix_dtype: dtype of the operands of its convolution or matrix product, or nothing.
    """

    name: str
    kind: str
    op_name: str
    frames: tuple[Frame, ...]
    times: int
    traffic: Traffic
    flops: Flops
    matrix_dtype: str
    collective: Collective | None


class Launch(NamedTuple):
    """An instruction that launches, how often, and whether others may run at the same time."""

    computation: Computation
    instruction: Instruction
    times: int
    asynchronous: bool


def kernels(program: Program) -> tuple[Kernel, ...]:
    """Returns everything that a step launches, in the order of the schedule.

    The body of a loop counts as often as it runs, once where that is not known (`unknown_loops`),
    and its condition not at all; of a conditional the branch that moves most bytes counts.
    """
    seen: set[tuple[str, str]] = set()
    return tuple(_kernel(program, launch, seen) for launch in launched(program, program.entry))


def launches(program: Program) -> int:
    """Returns the number of kernels that a step launches.

    Parameters, constants, tuples, their elements and bitcasts launch nothing, and an asynchronous
    pair launches once.
    """
    return sum(each.times for each in launched(program, program.entry))


def traffic(program: Program) -> Traffic:
    """Returns the bytes that a step moves.

    Every kernel reads its operands and writes its results. A slice counts as what it takes, an
    update in place as what it replaces, also inside fusions, where nothing else touches memory.
    Unlike XLA's count: a fusion reads a parameter at most once, a loop's body counts as often as
    it runs, index tables of tuples count nothing, custom calls count their operands and results
    without their workspace, and an asynchronous pair counts once.
    """
    return sum((each.times * each.traffic for each in kernels(program)), Traffic())


def flops(program: Program) -> Flops:
    """Returns the operations of a step; a loop's body counts as often as it runs."""
    return sum((each.times * each.flops for each in kernels(program)), Flops())


def collectives(program: Program) -> tuple[Collective, ...]:
    """Returns what a step communicates: one entry per kind, group size and synchrony."""
    found: dict[tuple[str, int, bool], Collective] = {}
    for kernel in kernels(program):
        if one := kernel.collective:
            key = (one.kind, one.group_size, one.asynchronous)
            so_far = found.get(key, dataclasses.replace(one, count=0, bytes=0))
            found[key] = dataclasses.replace(
                so_far,
                count=so_far.count + kernel.times,
                bytes=so_far.bytes + kernel.times * one.bytes,
            )
    return tuple(sorted(found.values(), key=lambda each: -each.bytes))


def unknown_loops(program: Program) -> tuple[str, ...]:
    """Returns the names of the loops whose number of trips is not known."""
    return tuple(
        each.name
        for computation in program.computations.values()
        for each in computation.instructions
        if each.opcode == "while" and trip_count(program, computation, each) is None
    )


def launched(
    program: Program, computation: Computation, times: int = 1, asynchronous: bool = False
) -> Iterator[Launch]:
    """Yields what running a computation so many times launches, in the order of the schedule."""
    for each in computation.instructions:
        if each.opcode == "while":
            trips = trip_count(program, computation, each)
            inside = times * (1 if trips is None else trips)
            body = program.computations[each.calls("body")]
            yield from launched(program, body, inside, asynchronous)
        elif each.opcode in ("call", "async-start"):
            inside = asynchronous or each.opcode == "async-start"
            yield from launched(program, program.callee(each), times, inside)
        elif each.opcode == "conditional":
            branches = [
                list(launched(program, program.computations[name], times, asynchronous))
                for name in each.called
            ]
            yield from max(branches, key=lambda branch: _moved_by(program, branch))
        elif not _is_free(each):
            yield Launch(computation, each, times, asynchronous or each.opcode.endswith("-start"))


def _is_free(instruction: Instruction) -> bool:
    return (
        instruction.opcode in WITHOUT_KERNEL
        or instruction.opcode.endswith(("-done", "-update"))
        or instruction.target in WITHOUT_KERNEL_TARGETS
    )


def _moved_by(program: Program, branch: Sequence[Launch]) -> int:
    moved = (each.times * _traffic(program, *each[:2]) for each in branch)
    return sum(each.total + each.on_chip for each in moved)


def _kernel(program: Program, launch: Launch, seen: set[tuple[str, str]]) -> Kernel:
    instruction = launch.instruction
    matrix_dtypes: dict[str, int] = defaultdict(int)
    count: dict[str, int] = dict.fromkeys(("matrix", "elementwise", "transcendental"), 0)
    for kind, dtype, number in _arithmetic(program, launch.computation, instruction):
        count[kind] += number
        if kind == "matrix":
            matrix_dtypes[dtype] += number
    origin = origin_of(program, instruction)
    return Kernel(
        name=instruction.name,
        kind=_kind(instruction),
        op_name=origin.op_name,
        frames=origin.frames,
        times=launch.times,
        traffic=_traffic(program, launch.computation, instruction),
        flops=Flops(**count),
        matrix_dtype=max(matrix_dtypes, key=matrix_dtypes.__getitem__, default=""),
        collective=_collective(program, launch, seen),
    )


def _kind(instruction: Instruction) -> str:
    if instruction.operation == "fusion":
        own = re.search(r'"kind":"(__\w+)"', instruction.backend_config)
        return own[1] if own else f"fusion {instruction.attributes.get('kind', '')}".strip()
    return instruction.target or instruction.operation


def origin_of(
    program: Program, instruction: Instruction, element: int | None = None
) -> Instruction:
    """Returns the instruction that names where this one's result (or element) comes from.

    A fusion's element is named by what computes it, a fusion without a name by the last of its
    instructions that has one.
    """
    if instruction.operation != "fusion":
        return instruction
    fused = program.callee(instruction)
    flat = len(fused.root.operands) == len(instruction.arrays)  # else a tuple of tuples
    if element is not None and fused.root.opcode == "tuple" and flat:
        made = fused.by_name[fused.root.operands[element]]
        if made.op_name:
            return made
    if instruction.op_name:
        return instruction
    named = [each for each in (*fused.instructions, fused.root) if each.op_name]
    return named[-1] if named else instruction


# Bytes


def results_of(computation: Computation, instruction: Instruction) -> tuple[Array, ...]:
    """Returns the arrays that it makes: of an asynchronous start, those of its end.

    A library call's last result is its workspace and is left out.
    """
    if instruction.opcode.endswith("-start"):
        ending: Instruction | None = instruction
        while ending and not ending.opcode.endswith("-done"):
            users = computation.users[ending.name]
            ending = next((u for u in users if u.opcode.endswith(("-done", "-update"))), None)
        if ending:
            return ending.arrays
        return tuple(a for each in computation.operands(instruction) for a in each.arrays)
    is_library = instruction.target.startswith(("__cudnn$", "__cublas$"))
    if is_library and isinstance(instruction.shape, tuple):
        return tuple(leaves(instruction.shape[:-1]))
    return instruction.arrays


def _traffic(program: Program, computation: Computation, instruction: Instruction) -> Traffic:
    return sum(_movements(program, computation, instruction), Traffic())


def _moved(direction: str, array: Array, size: int | None = None) -> Traffic:
    """Returns this array's bytes, or so many of them, as `read` or `written`."""
    field = direction if array.place == "device" else array.place
    return Traffic(**{field: array.bytes if size is None else size})


def _movements(
    program: Program, computation: Computation, instruction: Instruction
) -> Iterator[Traffic]:
    operands = [each.arrays for each in computation.operands(instruction)]
    results = results_of(computation, instruction)
    operation = instruction.operation
    if operation == "fusion":
        yield from _fusion_movements(program, instruction, operands, results)
    elif operation in ("slice", "dynamic-slice", "gather"):
        yield _moved("read", operands[0][0], results[0].bytes)
        yield from (_moved("read", array) for index in operands[1:] for array in index)
        yield _moved("written", results[0])
    elif operation in ("dynamic-update-slice", "scatter"):
        count = 1 if operation == "dynamic-update-slice" else len(operands) // 2
        yield from (_moved("read", array) for each in operands[count:] for array in each)
        updates = operands[1:2] if operation == "dynamic-update-slice" else operands[count + 1 :]
        for (target,), (update,) in zip(operands[:count], updates, strict=True):
            yield _moved("written", target, update.bytes)
            yield _moved("read", target, update.bytes if operation == "scatter" else 0)
    else:
        yield from (_moved("read", array) for each in operands for array in each)
        yield from (_moved("written", array) for array in results)


def _fusion_movements(
    program: Program,
    fusion: Instruction,
    operands: Sequence[Sequence[Array]],
    results: Sequence[Array],
) -> Iterator[Traffic]:
    fused = program.callee(fusion)
    for parameter, arrays in zip(fused.parameters, operands, strict=True):
        if arrays:
            yield _moved("read", arrays[0], _bytes_read(program, fused, parameter))
    for constant in fused.instructions:
        if constant.opcode == "constant" and constant.arrays[0].elements > 1:
            yield _moved("read", constant.arrays[0])
    made = fused.operands(fused.root) if fused.root.opcode == "tuple" else [fused.root]
    if len(made) != len(results):
        yield from (_moved("written", array) for array in results)
        return
    for array, each in zip(results, made, strict=True):
        update = _updated(program, fused, each)
        yield _moved("written", array, update.bytes if update else None)


def _bytes_read(program: Program, fused: Computation, value: Instruction) -> int:
    """Returns how much of a fusion's parameter its instructions read: all of it at most."""
    whole = sum(array.bytes for array in value.arrays)
    read = 0
    for user in fused.users[value.name]:
        first = user.operands[0] == value.name
        if user.opcode == "slice" or (user.opcode in ("dynamic-slice", "gather") and first):
            read += user.arrays[0].bytes
        elif user.opcode == "dynamic-update-slice" and first:
            continue
        elif user.opcode in ("bitcast", "get-tuple-element"):
            read += _bytes_read(program, fused, user)
        elif user.opcode == "fusion":
            inner = program.callee(user)
            parameters = zip(user.operands, inner.parameters, strict=True)
            read += sum(_bytes_read(program, inner, p) for o, p in parameters if o == value.name)
        else:
            return whole
    return min(read, whole)


def _updated(program: Program, fused: Computation, made: Instruction) -> Array | None:
    """Returns the part that an update in place at the end of a fusion replaces, if it is one."""
    while made.opcode == "bitcast":
        made = fused.by_name[made.operands[0]]
    if made.opcode == "fusion":
        inner = program.callee(made)
        return _updated(program, inner, inner.root)
    if made.opcode == "dynamic-update-slice":
        return fused.by_name[made.operands[1]].arrays[0]
    return None


# Operations

_Operation: TypeAlias = tuple[str, str, int]  # kind (a field of Flops), dtype, number


def _arithmetic(
    program: Program, computation: Computation, instruction: Instruction
) -> Iterator[_Operation]:
    operation = instruction.operation
    results = instruction.arrays
    operands = [each.arrays for each in computation.operands(instruction)]
    elements = results[0].elements if results else 0
    dtype = operands[0][0].dtype if operands and operands[0] else ""
    if operation in ELEMENTWISE:
        yield "elementwise", dtype, elements
    elif operation in TRANSCENDENTAL:
        yield "transcendental", dtype, sum(array.elements for array in results)
    elif operation in ("fusion", "call"):
        yield from _inside(program, program.callee(instruction), 1)
    elif operation in _APPLICATIONS:
        for name, times in zip(
            instruction.called, _APPLICATIONS[operation](instruction, operands), strict=True
        ):
            yield from _inside(program, program.computations[name], times)
    elif operation == "sort":
        count = operands[0][0].elements
        yield "elementwise", dtype, count * max(count - 1, 0).bit_length()
    elif operation == "all-reduce":
        yield "elementwise", dtype, sum(a.elements for each in operands for a in each)
    elif operation == "convolution" or instruction.target in CUDNN_CONVOLUTIONS:
        order = CUDNN_CONVOLUTIONS.get(instruction.target, (0, 1, 2))
        arrays = (operands[0][0], operands[1][0], results[0])
        yield "matrix", dtype, _convolution_flops(instruction, *(arrays[i] for i in order))
    elif operation in ("dot", "scaled-dot") or instruction.target in CUBLAS_PRODUCTS:
        yield "matrix", dtype, 2 * elements * _contracted(instruction, operands[0][0])


def _inside(program: Program, callee: Computation, times: int) -> Iterator[_Operation]:
    for each in callee.instructions:
        for kind, dtype, number in _arithmetic(program, callee, each):
            yield kind, dtype, times * number


def _window_size(instruction: Instruction) -> int:
    return math.prod(size for size, *_ in _window(instruction.attributes.get("window", "")))


# How often each function that an instruction calls is applied.
_APPLICATIONS = {
    "map": lambda this, operands: [this.arrays[0].elements],
    "reduce": lambda this, operands: [operands[0][0].elements - this.arrays[0].elements],
    "reduce-window": lambda this, operands: [
        (_window_size(this) - 1) * this.arrays[0].elements,
    ],
    "scatter": lambda this, operands: [operands[-1][0].elements],
    "select-and-scatter": lambda this, operands: [
        (_window_size(this) - 1) * operands[1][0].elements,
        operands[1][0].elements,
    ],
}


class _WindowDim(NamedTuple):
    size: int
    stride: int
    pad: int
    input_dilation: int
    kernel_dilation: int


def _window(text: str) -> list[_WindowDim]:
    """Reads `{size=3x3 stride=2x2 pad=1_1x1_1 lhs_dilate=1x1 rhs_dilate=1x1}`."""
    given = fields(text)
    sizes = given["size"].split("x") if "size" in given else []

    def field(name: str, default: str) -> list[str]:
        return given[name].split("x") if name in given else [default] * len(sizes)

    pads = [pad.split("_")[0] for pad in field("pad", "0_0")]
    columns = (sizes, field("stride", "1"), pads, field("lhs_dilate", "1"))
    rows = zip(*columns, field("rhs_dilate", "1"), strict=True)
    return [_WindowDim(*map(int, row)) for row in rows]


@functools.cache
def _taps(window: _WindowDim, size: int, kernel: int, output: int) -> int:
    """Returns how many pairs of an output and a tap meet an element of the input."""
    outputs = np.arange(output)[:, None] * window.stride - window.pad
    place = outputs + np.arange(kernel) * window.kernel_dilation
    inside = (place >= 0) & (place < size * window.input_dilation)
    return int(np.sum(inside & (place % window.input_dilation == 0)))


def _convolution_flops(this: Instruction, image: Array, kernel: Array, output: Array) -> int:
    labels = this.attributes.get("dim_labels", "")
    window = _window(this.attributes.get("window", ""))
    try:
        images, kernels_, outputs = (
            dict(zip(label, array.dims, strict=True))
            for label, array in zip(re.split("_|->", labels), (image, kernel, output), strict=True)
        )
        taps = [
            _taps(dim, images[str(i)], kernels_[str(i)], outputs[str(i)])
            for i, dim in enumerate(window)
        ]
    except (KeyError, ValueError):
        raise ValueError(
            f"line {this.line} of the HLO text: the dim_labels {labels!r} of {this.name!r} do not"
            f" name the dimensions of {image}, {kernel} and {output}"
        ) from None
    groups = int(this.attributes.get("feature_group_count", 1))
    batch_groups = int(this.attributes.get("batch_group_count", 1))
    channels = images["f"] // groups * outputs["f"]
    return 2 * channels * (images["b"] // batch_groups) * math.prod(taps)


def _contracted(product: Instruction, left: Array) -> int:
    """Returns the number of products that are added up for one element of a matrix product."""
    if product.target:
        pattern = r'"lhs_contracting_dimensions":\[([^\]]*)\]'
        found = re.search(pattern, product.backend_config)
        dims = found[1] if found else ""
    else:
        dims = product.attributes.get("lhs_contracting_dims", "")
    return math.prod(left.dims[dim] for dim in integers(dims))


# Collectives


def _collective(program: Program, launch: Launch, seen: set[tuple[str, str]]) -> Collective | None:
    """Returns what a kernel communicates.

    A TPU fuses a collective with other work and repeats it in each fusion that carries it on; those
    share a channel, and the first counts. An all-reduce fused with the slice that a device keeps is
    its reduce-scatter.
    """
    computation, instruction = launch.computation, launch.instruction
    operation = instruction.operation
    asynchronous = launch.asynchronous and '"is_sync":true' not in instruction.backend_config
    if operation == "fusion":
        found = _fused_collective(program, program.callee(instruction))
        if not found:
            return None
        fused, instruction = found
        channel = instruction.attributes.get("channel_id", instruction.name)
        if (computation.name, channel) in seen:
            return None
        seen.add((computation.name, channel))
        asynchronous = any("AsyncCollective" in each.target for each in fused.instructions)
        users = fused.users[instruction.name]
        scatters = users and all(each.opcode == "dynamic-slice" for each in users)
        computation, operation = fused, instruction.operation
        if operation == "all-reduce" and scatters:
            operation = "reduce-scatter"
    if operation not in COLLECTIVES:
        return None
    sent = sum(a.bytes for each in computation.operands(instruction) for a in each.arrays)
    received = sum(array.bytes for array in results_of(computation, instruction))
    size = _group_size(instruction, program.devices)
    return Collective(operation, 1, max(sent, received), size, asynchronous)


def _fused_collective(
    program: Program, fused: Computation
) -> tuple[Computation, Instruction] | None:
    for each in fused.instructions:
        if each.operation in COLLECTIVES:
            return fused, each
        if each.opcode == "fusion" and (found := _fused_collective(program, program.callee(each))):
            return found
    return None


def _group_size(instruction: Instruction, devices: int) -> int:
    """Reads `{{0,1},{2,3}}`, `[2,4]<=[8]`, `mesh['a'=2,'b'=4] {'b'}`, or pairs of a permutation.

    The names of a mesh stand behind its `device_ids` where these are not in order.
    """
    if "source_target_pairs" in instruction.attributes:
        return len(set(integers(instruction.attributes["source_target_pairs"])))
    groups = instruction.attributes.get("replica_groups", "{}")
    if groups.startswith("mesh"):
        axes, _, names = groups.partition("]")
        names = names or instruction.attributes.get("device_ids", "")
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", names)
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    if groups.startswith("["):
        return integers(groups[: groups.index("]")])[-1]
    first = re.search(r"\{\s*([\d,\s]+)\}", groups)
    return len(integers(first[1])) if first else devices
