"""Finds out how often a loop runs."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from cnn_jax.runtime.hlo.text import Array, Computation, Instruction, Program

LONGEST_LOOP = 100_000  # trips that are counted by running a loop's counter


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often the body of this `while` runs, or None where the text does not tell.

    The compiler's own `known_trip_count` counts; without one (TPU) the scalar integers that the
    loop carries are followed from their constants until its condition fails.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.backend_config)
    if known:
        return int(known[1])
    carried = _scalars(program, computation, loop.operands[0], ())
    body, condition = (program.computations[loop.calls(key)] for key in ("body", "condition"))
    for trips in range(LONGEST_LOOP):
        goes_on = _scalars(program, condition, condition.root.name, (carried,))
        if not isinstance(goes_on, int):
            return None
        if not goes_on:
            return trips
        carried = _scalars(program, body, body.root.name, (carried,))
    return None


_Scalars: TypeAlias = "int | tuple[_Scalars, ...] | None"


def _scalars(
    program: Program, computation: Computation, name: str, arguments: Sequence[_Scalars]
) -> _Scalars:
    """Returns the value of an integer (None: not known), of a tuple that of each element."""
    known: dict[str, _Scalars] = {}

    def value(name: str) -> _Scalars:
        if name not in known:
            known[name] = compute(computation.by_name[name])
        return known[name]

    def compute(this: Instruction) -> _Scalars:
        is_scalar = isinstance(this.shape, Array) and not this.shape.dims
        if not is_scalar and isinstance(this.shape, Array):
            return None
        match this.opcode:
            case "parameter":
                number = int(this.literal)
                return arguments[number] if number < len(arguments) else None
            case "constant":
                return int(this.literal) if re.fullmatch(r"-?\d+", this.literal) else None
            case "tuple":
                return tuple(map(value, this.operands))
            case "get-tuple-element":
                inside = value(this.operands[0])
                index = int(this.attributes["index"])
                return inside[index] if isinstance(inside, tuple) else None
            case "copy" | "bitcast" | "convert" | "reshape":
                return value(this.operands[0])
            case "fusion" | "call":
                callee = program.callee(this)
                inner = tuple(map(value, this.operands))
                return _scalars(program, callee, callee.root.name, inner)
        operation = _INTEGER_OPERATIONS.get(this.attributes.get("direction", this.opcode))
        values = [value(each) for each in this.operands] if operation else []
        left_right = [each for each in values if isinstance(each, int)]
        return operation(*left_right) if operation and len(left_right) == 2 else None

    return value(name)


_INTEGER_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "NE": operator.ne,
    "EQ": operator.eq,
}
