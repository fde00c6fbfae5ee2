"""Follows the buffers of a step through its schedule."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from cnn_jax.runtime.hlo.costs import launched, origin_of, results_of
from cnn_jax.runtime.hlo.opcodes import IN_PLACE, SAME_BUFFER
from cnn_jax.runtime.hlo.text import Array, Computation, Frame, Instruction, Program, Shape, Traced


@dataclass(frozen=True)
class Buffer(Traced):
    """An array that a step keeps in memory.

    Attributes:
      name: of the instruction that makes it.
      opcode: of that instruction; `parameter` for an argument.
      array: its dtype, sizes and layout.
      op_name: the path of the layer and operation in JAX; of an argument its name.
      frames: where in Python it was traced, innermost call first.
      kind: `arguments`, `outputs`, `constants`, `activations` or `temporaries`.
      first, last: the places in the schedule between which it is needed.
    """

    name: str
    opcode: str
    array: Array
    op_name: str
    frames: tuple[Frame, ...]
    kind: str = "temporaries"
    first: int = 0
    last: int = 0

    @property
    def dtype(self) -> str:
        return self.array.dtype

    @property
    def bytes(self) -> int:
        return self.array.bytes


def large_buffers(program: Program, least_bytes: int) -> tuple[Buffer, ...]:
    """Returns the arrays of at least so many bytes that some kernel writes, and such arguments.

    The largest come first; what stays inside a fusion has no buffer. Buffers of loops and branches
    are among them; `kind`, `first` and `last` are not set: see `liveness`.
    """
    arguments = [
        _buffer(program, each, i) for each in program.entry.parameters for i in _indices(each)
    ]
    made = [
        _buffer(program, launch.instruction, i, array)
        for launch in launched(program, program.entry)
        for i, array in enumerate(results_of(launch.computation, launch.instruction))
    ]
    large = [each for each in (*arguments, *made) if each.bytes >= least_bytes]
    return tuple(sorted(large, key=lambda each: -each.bytes))


def _indices(instruction: Instruction) -> range:
    return range(len(instruction.arrays))


def _buffer(
    program: Program, instruction: Instruction, index: int, array: Array | None = None
) -> Buffer:
    element = index if isinstance(instruction.shape, tuple) else None
    origin = origin_of(program, instruction, element)
    return Buffer(
        name=instruction.name,
        opcode=instruction.operation,
        array=array or instruction.arrays[index],
        op_name=origin.op_name,
        frames=origin.frames,
        kind={"parameter": "arguments", "constant": "constants"}.get(
            instruction.opcode, "temporaries"
        ),
    )


KINDS = ("arguments", "constants", "activations", "temporaries", "outputs")


class Point(NamedTuple):
    """The memory that is needed while one instruction runs: bytes by kind of buffer."""

    name: str
    op_name: str
    live: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.live.values())


@dataclass(frozen=True)
class Liveness:
    """The main memory of the device over the life of the program.

    Attributes:
      points: one for each instruction of the schedule.
      buffers: those of the entry computation, with their kind and the points they live between.
    """

    points: tuple[Point, ...]
    buffers: tuple[Buffer, ...]

    @property
    def peak(self) -> Point:
        return max(self.points, key=lambda point: point.total)

    def at(self, index: int) -> tuple[Buffer, ...]:
        """Returns the buffers that live at a point, the largest first."""
        live = [each for each in self.buffers if each.first <= index <= each.last]
        return tuple(sorted(live, key=lambda each: -each.bytes))


def liveness(program: Program) -> Liveness:
    """Returns which buffers live when, by the schedule of the entry computation.

    A buffer lives from the instruction that makes it to the last that reads it; arguments and
    constants live all the time. An output in the memory of a donated argument counts as that
    argument. A loop works in the memory of what it carries; while a loop, call or conditional runs,
    the peak of its own temporaries is added. Where an operand dies, an elementwise kernel, an
    update in place or an all-reduce with a result of the same type takes over its memory.

    `activations` are the temporaries that are made in the forward pass and read last in the
    backward pass. The whole is what the schedule needs: a compiler adds alignment, workspaces of
    libraries and scratch memory inside kernels, and may reuse memory in more ways.
    """
    entry = program.entry
    buffers, inner = _lifetimes(program, entry, is_entry=True)
    changes: list[dict[str, int]] = [dict.fromkeys(KINDS, 0) for _ in (*entry.instructions, None)]
    for each in buffers:
        changes[each.first][each.kind] += each.bytes
        changes[each.last + 1][each.kind] -= each.bytes
    live: dict[str, int] = dict.fromkeys(KINDS, 0)
    points = []
    for index, instruction in enumerate(entry.instructions):
        live = {kind: live[kind] + changes[index][kind] for kind in KINDS}
        now = {**live, "temporaries": live["temporaries"] + inner.get(index, 0)}
        points.append(Point(instruction.name, origin_of(program, instruction).op_name, now))
    return Liveness(tuple(points), tuple(buffers))


_Tree: TypeAlias = "int | tuple[_Tree, ...]"


def _lifetimes(
    program: Program, computation: Computation, *, is_entry: bool
) -> tuple[list[Buffer], dict[int, int]]:
    """Returns the buffers that a computation needs in device memory, and by place in the schedule
    the bytes that the computations called there need besides.

    Arguments and results of another computation than the entry belong to its caller.
    """
    made, values = _values(program, computation)
    last = _last_uses(computation, values, len(made))
    results = set(_flat(values[computation.root.name]))
    elsewhere = set(_donated(program, values)) if is_entry else results
    shared = _taken_over(computation, values, made, last)
    way_back = _way_back(program, computation)
    end = len(computation.instructions) - 1
    buffers = []
    for index, (place, buffer) in enumerate(made):
        first, final, kind = place + (index in shared), last[index], buffer.kind
        if kind in ("arguments", "constants"):
            first, final = 0, end
        elif index in elsewhere:
            continue
        elif index in results:
            kind, final = "outputs", end
        elif place in way_back.waits_for and final in way_back.places:
            kind = "activations"
        belongs_here = is_entry or kind != "arguments"
        if belongs_here and buffer.array.place == "device" and first <= final:
            buffers.append(dataclasses.replace(buffer, kind=kind, first=first, last=final))
    return buffers, _inner_peaks(program, computation)


class _WayBack(NamedTuple):
    places: set[int]
    waits_for: set[int]


def _way_back(program: Program, computation: Computation) -> _WayBack:
    """Returns the places of the backward pass, and those of what comes before it.

    JAX marks the one by `transpose(` in the names. What has no name comes before it if it stands
    before the end of the forward pass, which JAX marks by `jvp(` alone.
    """
    names = [origin_of(program, each).op_name for each in computation.instructions]
    places = {place for place, name in enumerate(names) if "transpose(" in name}
    forward = {place for place, name in enumerate(names) if "jvp(" in name} - places
    end = max(forward, default=-1)
    return _WayBack(places, {place for place in range(end + 1) if place not in places})


def _values(
    program: Program, computation: Computation
) -> tuple[list[tuple[int, Buffer]], dict[str, _Tree]]:
    """Returns all buffers with the place where they are made, and which ones each value is."""
    made: list[tuple[int, Buffer]] = []
    values: dict[str, _Tree] = {}
    for place, each in enumerate(computation.instructions):
        if each.opcode == "tuple":
            values[each.name] = tuple(values[name] for name in each.operands)
        elif each.opcode == "get-tuple-element":
            inside = values[each.operands[0]]
            index = int(each.attributes["index"])
            values[each.name] = inside[index] if isinstance(inside, tuple) else inside
        elif each.opcode in SAME_BUFFER or each.opcode.endswith(("-done", "-update")):
            values[each.name] = values[each.operands[0]]
        else:
            start = len(made)
            arrays = results_of(computation, each)
            for index, array in enumerate(arrays):
                made.append((place, _buffer(program, each, index, array)))
            values[each.name] = _numbered(_result_shape(computation, each), itertools.count(start))
    return made, values


def _result_shape(computation: Computation, instruction: Instruction) -> Shape:
    arrays = results_of(computation, instruction)
    if arrays == instruction.arrays:
        return instruction.shape
    if isinstance(instruction.shape, tuple) and not instruction.opcode.endswith("-start"):
        return instruction.shape[: len(arrays)]
    return arrays[0] if len(arrays) == 1 else arrays


def _numbered(shape: Shape, numbers: Iterator[int]) -> _Tree:
    if isinstance(shape, Array):
        return next(numbers)
    return tuple(_numbered(part, numbers) for part in shape)


def _flat(tree: _Tree) -> Iterator[int]:
    if isinstance(tree, int):
        yield tree
    else:
        for part in tree:
            yield from _flat(part)


def _last_uses(computation: Computation, values: Mapping[str, _Tree], count: int) -> list[int]:
    """Returns where each buffer is read last; what nobody reads dies where it is made."""
    last = [0] * count
    waiting: dict[str, tuple[str, ...]] = {}
    for place, each in enumerate(computation.instructions):
        names = (each.name, *(() if each.opcode in SAME_BUFFER else each.operands))
        if each.opcode.endswith("-start"):
            waiting[each.name] = each.operands
        elif each.opcode.endswith(("-done", "-update")):
            held = waiting.get(each.operands[0], ())
            waiting[each.name] = held
            names = (*names, *held)
        for name in names:
            for index in _flat(values[name]):
                last[index] = place
    return last


def _donated(program: Program, values: Mapping[str, _Tree]) -> Iterator[int]:
    """Yields the results that lie in the memory of an argument."""
    for alias in program.aliases:
        tree = values[program.entry.root.name]
        for index in alias.output:
            tree = tree[index] if isinstance(tree, tuple) else tree
        yield from _flat(tree)


def _taken_over(
    computation: Computation,
    values: Mapping[str, _Tree],
    made: Sequence[tuple[int, Buffer]],
    last: Sequence[int],
) -> set[int]:
    """Returns the buffers that begin in the memory of an operand which dies where they begin."""
    shared, taken = set(), set()
    places = {place for place, _ in made}
    for place in sorted(places):
        each = computation.instructions[place]
        if not _works_in_place(each):
            continue
        dying = [
            index
            for name in each.operands
            for index in _flat(values[name])
            if last[index] == place and made[index][1].kind == "temporaries"
        ]
        for mine in _flat(values[each.name]):
            array = made[mine][1].array
            match = (i for i in dying if made[i][1].array == array and i not in taken)
            if (found := next(match, None)) is not None:
                taken.add(found)
                shared.add(mine)
    return shared


def _works_in_place(instruction: Instruction) -> bool:
    if instruction.operation == "fusion":
        return instruction.attributes.get("kind") != "kCustom"
    return instruction.operation in IN_PLACE


def _inner_peaks(program: Program, computation: Computation) -> dict[int, int]:
    """Returns, by place in the schedule, the peak memory of what is called there."""
    callers = ("while", "call", "conditional", "async-start")
    return {
        place: max(_own_peak(program, name) for name in each.called)
        for place, each in enumerate(computation.instructions)
        if each.opcode in callers and each.called
    }


def _own_peak(program: Program, name: str) -> int:
    computation = program.computations[name]
    buffers, inner = _lifetimes(program, computation, is_entry=False)
    sizes = np.zeros(len(computation.instructions) + 1, np.int64)
    for each in buffers:
        sizes[each.first] += each.bytes
        sizes[each.last + 1] -= each.bytes
    live = np.cumsum(sizes)
    for place, bytes_ in inner.items():
        live[place] += bytes_
    return int(live.max())
