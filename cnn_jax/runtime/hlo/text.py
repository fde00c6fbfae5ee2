"""Reads the text of an optimised HLO module into computations and instructions."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

BITS = {
    **dict.fromkeys(("token", "opaque"), 0),
    **dict.fromkeys(("s1", "u1"), 1),
    **dict.fromkeys(("s2", "u2"), 2),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
    **dict.fromkeys(("pred", "s8", "u8", "f8e3m4", "f8e4m3", "f8e4m3fn", "f8e4m3b11fnuz"), 8),
    **dict.fromkeys(("f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz", "f8e8m0fnu"), 8),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    "c128": 128,
}

CALLS = (
    "calls",
    "to_apply",
    "body",
    "condition",
    "branch_computations",
    "true_computation",
    "false_computation",
    "select",
    "scatter",
)

HOST = 5  # the memory space; space 1 of a TPU is on the chip, of a GPU in its main memory


@dataclass(frozen=True)
class Array:
    """The type of one array in memory.

    Attributes:
      dtype: as HLO spells it, `bf16`.
      dims: sizes, outermost logical dimension first.
      minor_to_major: the layout; empty where the text has none.
      tiles: TPU tiles, outermost first; the last dimensions are padded to whole ones.
      memory_space: 0 is the device's main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    memory_space: int = 0

    @functools.cached_property
    def elements(self) -> int:
        return math.prod(self.dims)

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes in memory, padding to whole tiles included."""
        padded = [self.dims[dim] for dim in reversed(self.minor_to_major)]
        for tile in self.tiles:
            padded = [1] * (len(tile) - len(padded)) + padded
            outer, inner = padded[: -len(tile)], padded[-len(tile) :]
            padded = [*outer, *(-(-n // t) for n, t in zip(inner, tile, strict=True)), *tile]
        elements = math.prod(padded) if self.tiles else self.elements
        return -(-elements * BITS[self.dtype] // 8)

    @property
    def place(self) -> str:
        """`device`, `on_chip` (a TPU's vector memory and the like) or `host`."""
        if self.memory_space == HOST:
            return "host"
        return "on_chip" if self.memory_space and self.tiles else "device"

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


Shape: TypeAlias = "Array | tuple[Shape, ...]"


class Frame(NamedTuple):
    """One line of the Python program that an instruction came from."""

    file: str
    line: int
    function: str = ""


class Traced:
    """Something with a place in the Python program."""

    frames: tuple[Frame, ...]

    @property
    def source(self) -> str:
        """`file:line` of the innermost frame, or nothing."""
        return "{}:{}".format(*self.frames[0][:2]) if self.frames else ""


@dataclass(frozen=True)
class Instruction(Traced):
    """One line of a computation.

    Attributes:
      operands: names of instructions in the same computation.
      literal: the text between the parentheses of a constant or a parameter.
      attributes: raw text by name: `calls`, `window`, `dim_labels`, `backend_config` and so on.
      op_name: JAX's path of the operation, `jit(step)/jvp(Net)/stem/conv_general_dilated`.
      frames: where in Python it was traced, innermost call first.
      line: its line in the text.
    """

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...] = ()
    literal: str = ""
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    op_name: str = ""
    frames: tuple[Frame, ...] = ()
    line: int = 0

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its result, tuples flattened."""
        return tuple(leaves(self.shape))

    @property
    def operation(self) -> str:
        """The opcode, of an asynchronous pair that of what runs."""
        return self.opcode.removesuffix("-start")

    @property
    def target(self) -> str:
        """The target of a custom call."""
        return self.attributes.get("custom_call_target", "").strip('"')

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls, in the order of `CALLS`."""
        texts = (self.attributes[key] for key in CALLS if key in self.attributes)
        return tuple(_name(part) for text in texts for part in _pieces(text.strip("{}")))

    def calls(self, key: str) -> str:
        """Returns the name of the computation that it calls as its `body`, `condition` ..."""
        return _name(self.attributes[key])

    @property
    def backend_config(self) -> str:
        return self.attributes.get("backend_config", "").replace('\\"', '"')


@dataclass(frozen=True)
class Computation:
    """A function of the program; its instructions stand in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {each.name: each for each in self.instructions}

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """Its parameters in the order of their numbers."""
        found = [each for each in self.instructions if each.opcode == "parameter"]
        return tuple(sorted(found, key=lambda each: int(each.literal)))

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Who reads each instruction."""
        users = defaultdict(list)
        for each in self.instructions:
            for operand in dict.fromkeys(each.operands):
                users[operand].append(each)
        return {name: tuple(users[name]) for name in self.by_name}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.by_name[name] for name in instruction.operands]


class Alias(NamedTuple):
    """An output that is written into the memory of an argument."""

    output: tuple[int, ...]
    parameter: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A compiled module, as one of its devices runs it.

    Attributes:
      scheduled: whether the order of instructions is the order in which they run.
      aliases: which outputs reuse which arguments (donation).
      devices: replicas times partitions.
    """

    name: str
    scheduled: bool
    aliases: tuple[Alias, ...]
    devices: int
    entry: Computation
    computations: Mapping[str, Computation]

    def callee(self, instruction: Instruction) -> Computation:
        """Returns the first computation that it calls: of a loop, its body."""
        return self.computations[instruction.called[0]]


def leaves(shape: Shape) -> Iterator[Array]:
    """Yields the arrays of a type, tuples flattened."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]')
_COMMENT = re.compile(r'("(?:[^"\\]|\\.)*")|/\*.*?\*/', re.DOTALL)
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
_INSTRUCTION = re.compile(r"(ROOT\s+)?%?([^\s=%]+)\s*=\s*(?=\S)")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
_COMPUTATION = re.compile(r"(ENTRY\s+)?%?([^\s(){}=]+)\s*(\(.*\)\s*->.*)?\{")
_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^\s}]+)')
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_TABLE_ROW = re.compile(r"(\d+)\s+(.*)")
_OPENING, _CLOSING = "([{", ")]}"


class _UnreadableError(ValueError):
    """A part of a line that is not HLO."""


def read(text: str) -> Program:
    """Returns the program that the text of an optimised HLO module describes.

    Raises:
      ValueError: with the number of the line that cannot be read.
    """
    stacks = _Stacks()
    header, table, entry = "", "", ""
    computations: dict[str, Computation] = {}
    body: list[Instruction] | None = None
    name, root = "", ""
    number = 0
    for number, line in _statements(text):
        try:
            if body is not None and line.startswith("}"):
                computations[name] = _computation(name, body, root)
                body = None
            elif body is not None:
                instruction, is_root = _instruction(line, number, stacks)
                root = instruction.name if is_root else root
                body.append(instruction)
            elif line in _TABLES:
                table = line
            elif line.startswith("HloModule"):
                header = line
            elif header and (found := _COMPUTATION.fullmatch(line)):
                name, root, body, table = found[2], "", [], ""
                entry = name if found[1] else entry
            elif table and (found := _TABLE_ROW.fullmatch(line)):
                stacks.tables[table][int(found[1])] = found[2]
            else:
                raise _UnreadableError("neither a computation nor a table of an HLO module")
        except _UnreadableError as error:
            raise ValueError(f"line {number} of the HLO text: {error}: {line[:120]!r}") from None
    if not header or not entry or body is not None:
        missing = "a HloModule line" if not header else "the end of an ENTRY computation"
        raise ValueError(f"line {number} of the HLO text: it ends without {missing}")
    _check_calls(computations)
    return _program(header, computations, entry)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Yields the number and text of every statement; one that is broken over lines is joined."""
    pending, first = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if "/*" in line:
            line = _COMMENT.sub(lambda found: found[1] or "", line).strip()
        if not line:
            continue
        if pending:
            pending += " " + line
        elif _is_open(line) and not _COMPUTATION.fullmatch(line):
            pending, first = line, number
        else:
            yield number, line
        if pending and not _is_open(pending):
            yield first, pending
            pending = ""
    if pending:
        yield first, pending


def _is_open(line: str) -> bool:
    if line.endswith(","):
        return True
    if all(line.count(a) == line.count(b) for a, b in zip(_OPENING, _CLOSING, strict=True)):
        return False
    tokens = [found[0] for found in _TOKEN.finditer(line)]
    return sum(token in _OPENING for token in tokens) > sum(token in _CLOSING for token in tokens)


def _pieces(text: str) -> list[str]:
    """Splits at the commas that stand outside brackets and strings."""
    pieces, depth, start = [], 0, 0
    for found in _TOKEN.finditer(text):
        token = found[0]
        depth += (token in _OPENING) - (token in _CLOSING)
        if token == "," and depth == 0:
            pieces.append(text[start : found.start()])
            start = found.end()
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces if piece.strip()]


def _end_of_bracket(text: str, start: int) -> int:
    """Returns the place behind the bracket that closes the one at `start`."""
    depth = 0
    for found in _TOKEN.finditer(text, start):
        depth += (found[0] in _OPENING) - (found[0] in _CLOSING)
        if depth == 0:
            return found.end()
    raise _UnreadableError("a bracket is not closed")


def _name(text: str) -> str:
    """Returns the name in `%name`, `name` or `f32[2]{0} %name`."""
    return text.split()[-1].removeprefix("%")


def _shape(text: str) -> Shape:
    text = text.strip()
    if text.startswith("("):
        return tuple(_shape(piece) for piece in _pieces(text[1:-1]))
    found = _ARRAY.fullmatch(text)
    if not found or found[1] not in BITS:
        raise _UnreadableError(f"{text[:60]!r} is not the type of an array")
    dims, order, rest = (found[i] or "" for i in (2, 3, 4))
    tiles = re.match(r"T((?:\([\d,]+\))+)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Array(
        dtype=found[1],
        dims=integers(dims),
        minor_to_major=integers(order),
        tiles=tuple(map(integers, re.findall(r"\(([\d,]+)\)", tiles[1]))) if tiles else (),
        memory_space=int(space[1]) if space else 0,
    )


def fields(text: str) -> dict[str, str]:
    """Reads `{name=value other="value"}`; strings keep their quotes."""
    return dict(_FIELD.findall(text))


def integers(text: str) -> tuple[int, ...]:
    """Returns the integers in a text."""
    return tuple(map(int, re.findall(r"-?\d+", text)))


def _instruction(line: str, number: int, stacks: "_Stacks") -> tuple[Instruction, bool]:
    """Returns the instruction of this line, and whether it is the root."""
    found = _INSTRUCTION.match(line)
    if not found:
        raise _UnreadableError("not an instruction")
    start = found.end()
    if line[start] == "(":
        end = _end_of_bracket(line, start)
    else:
        array = _ARRAY.match(line, start)
        end = array.end() if array else start
    opcode = _OPCODE.match(line, end)
    if not opcode:
        raise _UnreadableError("no type and opcode behind '='")
    close = _end_of_bracket(line, opcode.end() - 1)
    inside = line[opcode.end() : close - 1]
    with_literal = opcode[1] in ("constant", "parameter")
    attributes = dict(_attribute(piece) for piece in _pieces(line[close:]))
    metadata = fields(attributes.pop("metadata", ""))
    instruction = Instruction(
        name=found[2],
        opcode=opcode[1],
        shape=_shape(line[start:end]),
        operands=() if with_literal else tuple(map(_name, _pieces(inside))),
        literal=inside.strip() if with_literal else "",
        attributes=attributes,
        op_name=_unquoted(metadata.get("op_name", "")),
        frames=_frames(metadata, stacks),
        line=number,
    )
    return instruction, bool(found[1])


def _attribute(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key.strip(), value.strip()


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text.strip('"'))


def _frames(metadata: Mapping[str, str], stacks: "_Stacks") -> tuple[Frame, ...]:
    """Returns the stack of an instruction; older texts name one line in its metadata."""
    if "source_file" in metadata:
        line = metadata.get("source_line", "0")
        return (Frame(_unquoted(metadata["source_file"]), int(line)),)
    return stacks.frames(int(metadata.get("stack_frame_id", 0)))


class _Stacks:
    """The tables of Python stacks that newer texts begin with."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
        self._known: dict[int, tuple[Frame, ...]] = {}

    def frames(self, index: int) -> tuple[Frame, ...]:
        """Returns the stack with this number, innermost call first."""
        if index not in self.tables["StackFrames"]:
            return ()
        if index not in self._known:
            self._known[index] = ()  # should it be its own parent
            row = fields(self.tables["StackFrames"][index])
            # The text counts parents from 1, where 1 stands for "none".
            outer = self.frames(int(row.get("parent_frame_id", 1)) - 1)
            self._known[index] = (self._frame(int(row["file_location_id"])), *outer)
        return self._known[index]

    def _frame(self, location: int) -> Frame:
        place = fields(self.tables["FileLocations"].get(location, ""))
        file = self.tables["FileNames"].get(int(place.get("file_name_id", 0)), "")
        function = self.tables["FunctionNames"].get(int(place.get("function_name_id", 0)), "")
        return Frame(_unquoted(file), int(place.get("line", 0)), _unquoted(function))


def _computation(name: str, body: Sequence[Instruction], root: str) -> Computation:
    if not body:
        raise _UnreadableError(f"computation {name!r} is empty")
    by_name = {each.name: each for each in body}
    for each in body:
        for operand in each.operands:
            if operand not in by_name:
                raise ValueError(
                    f"line {each.line} of the HLO text: {each.name!r} reads {operand!r},"
                    f" which computation {name!r} does not have"
                )
    return Computation(name, tuple(body), by_name[root or body[-1].name])


def _check_calls(computations: Mapping[str, Computation]) -> None:
    for computation in computations.values():
        for each in computation.instructions:
            for name in each.called:
                if name not in computations:
                    raise ValueError(
                        f"line {each.line} of the HLO text: {each.name!r} calls {name!r}, which"
                        " the module does not have"
                    )


def _program(header: str, computations: Mapping[str, Computation], entry: str) -> Program:
    words, *pieces = _pieces(header)
    attributes = dict(map(_attribute, pieces))
    aliases = re.findall(
        r"\{([\d, ]*)\}:\s*\((\d+),\s*\{([\d, ]*)\}", attributes.get("input_output_alias", "")
    )
    return Program(
        name=_name(words),
        scheduled=attributes.get("is_scheduled") == "true",
        aliases=tuple(Alias(integers(a), int(b), integers(c)) for a, b, c in aliases),
        devices=int(attributes.get("num_partitions", 1)) * int(attributes.get("replica_count", 1)),
        entry=computations[entry],
        computations=computations,
    )
