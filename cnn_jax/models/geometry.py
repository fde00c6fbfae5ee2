"""How large the feature maps are, how far their elements see, and what a network costs.

The closed formulas are for a pencil; `layers` reads the same numbers, and the parameters and
multiply-adds, off any linen model for any size of image, without running it.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from cnn_jax.models.receptive_fields import (
    REDUCTIONS,
    UNKNOWN,
    Call,
    Value,
    View,
    views_of_outputs,
)


def output_size(
    size: int, kernel_size: int, strides: int = 1, padding: int = 0, dilation: int = 1
) -> int:
    """Returns the pixels that a convolution or a pool makes along one axis.

        floor((W - K + 2P) / S) + 1,   K = dilation * (kernel_size - 1) + 1

    Arguments:
      size: W, pixels of the input.
      kernel_size: taps of the kernel; `dilation` is the pixels between two of them.
      strides: S, pixels between two windows.
      padding: P, pixels on each side.

    Raises ValueError for a number out of range, or a kernel that does not fit the padded input.

    Source: Dumoulin and Visin 2016, arXiv:1603.07285, relationship 6 (15 with dilation).
    """
    _at_least(1, size=size, kernel_size=kernel_size, strides=strides, dilation=dilation)
    _at_least(0, padding=padding)
    kernel = dilation * (kernel_size - 1) + 1
    if kernel > size + 2 * padding:
        raise ValueError(
            f"kernel_size={kernel_size}, dilation={dilation}: spans {kernel} pixels; must be <= "
            f"size + 2 * padding = {size + 2 * padding}"
        )
    return (size - kernel + 2 * padding) // strides + 1


def receptive_field_of_stack(kernel_size: int, num_layers: int) -> int:
    """Returns the pixels of the input that one output of L equal convolutions sees, on one axis.

        K + (K - 1)(L - 1)

    All have stride 1 and no dilation; `receptive_field` is for any others. Raises ValueError for a
    number below 1.
    """
    _at_least(1, kernel_size=kernel_size, num_layers=num_layers)
    return kernel_size + (kernel_size - 1) * (num_layers - 1)


def receptive_field(layers: Iterable[Sequence[int]]) -> int:
    """Returns the pixels of the input that one output of a chain of layers sees, on one axis.

        1 + sum over l of D_l (K_l - 1) * product over i < l of S_i

    Padding and the edge of the image are left out of account, so it may exceed the image.

    Arguments:
      layers: (kernel_size, strides) or (kernel_size, strides, dilation) of each convolution or
        pool, from the input on.

    Raises ValueError for a layer of another length or a number below 1.

    Source: Araujo, Norris and Sim 2019, doi:10.23915/distill.00021.
    """
    field, jump = 1, 1
    for layer in layers:
        if not isinstance(layer, Sequence) or len(layer) not in (2, 3):
            raise ValueError(
                f"layers: {layer!r}: must be (kernel_size, strides) or "
                "(kernel_size, strides, dilation)"
            )
        kernel_size, strides, dilation = (*layer, 1)[:3]
        _at_least(1, kernel_size=kernel_size, strides=strides, dilation=dilation)
        field += dilation * (kernel_size - 1) * jump
        jump *= strides
    return field


@dataclasses.dataclass(frozen=True)
class Layer:
    """One row of the table: what a layer makes of one image, and what it costs.

    A pair is of height and width. None stands for what does not exist, such as the stride of a
    dense layer, or is not known, because a primitive's reach is not.

    Attributes:
      path: of the module, such as "stage1_block1/conv1/norm"; "" is the model itself.
      modules: classes along that path, the model's first.
      kind: "conv", "dense", "max_pool", "average_pool", "global_pool", "norm", "concatenate", "add"
        and "multiply" (of two branches), "elementwise", else the class of the module or the name of
        a primitive.
      output: shape for one image, channels last.
      strides: pixels of the image between two neighbours of the output.
      receptive_field: pixels of the image that one element sees, padding included.
      centre: pixel of the image in the middle of what the first element sees.
      sees_whole_image: whether every element sees all of the image.
      parameters: each counted at the layer that uses it first.
      multiply_adds: of convolutions and matrix products; None in a loop of unknown length.
      activation_bytes: of the output.
    """

    path: str
    kind: str
    output: tuple[int, ...]
    modules: tuple[str, ...] = ()
    strides: tuple[int | None, int | None] = (None, None)
    receptive_field: tuple[int | None, int | None] = (None, None)
    centre: tuple[float | None, float | None] = (None, None)
    sees_whole_image: bool = False
    parameters: int = 0
    multiply_adds: int | None = 0
    activation_bytes: int = 0


def layers(
    model: nn.Module,
    image_shape: Sequence[int],
    *,
    method: str | None = None,
    dtype: Any = jnp.float32,
) -> list[Layer]:
    """Returns the layers of a linen model in the order in which they run, without running it.

    A layer is a convolution, a product of matrices, a pool, a normalisation or the meeting of two
    branches; the activation function behind it belongs to it. The parameters sum to those of the
    model: any that no layer uses come last, as kind "unused".

    Arguments:
      model: any linen module that takes images [b, h, w, c]; `train=False` is passed if it takes
        that.
      image_shape: (height, width, channels) of one image.
      method: name of the method to follow instead of `__call__`.
      dtype: of the images.

    Raises ValueError for an `image_shape` of another form, and what the model raises for it.
    """
    height, width, channels = _checked(image_shape)
    images = jax.ShapeDtypeStruct((1, height, width, channels), dtype)
    entry = inspect.signature(getattr(model, method or "__call__")).parameters
    keywords: dict[str, Any] = {"train": False} if "train" in entry else {}
    if method is not None:
        keywords["method"] = method

    variables = jax.eval_shape(
        lambda images: model.init(jax.random.key(0), images, **keywords), images
    )
    trace = _Trace((height, width))
    with nn.intercept_methods(trace.mark_module):
        closed = jax.make_jaxpr(lambda *inputs: model.apply(*inputs, **keywords))(variables, images)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    inputs = [
        Value(leaf.shape, leaf.dtype, variables=frozenset([number]))
        for number, (_, leaf) in enumerate(leaves)
    ]
    views = (View(1, 1, 0, 1), View(2, 1, 0, 1))
    trace.run(closed, [*inputs, Value(images.shape, images.dtype, views)])
    parameters = {
        number: (tuple(str(key.key) for key in path[1:-1]), math.prod(leaf.shape))
        for number, (path, leaf) in enumerate(leaves)
        if path[0].key == "params"
    }
    return _as_layers(trace, parameters)


def grouped(layers: Iterable[Layer], depth: int) -> list[Layer]:
    """Returns one layer for all that follow each other in a module `depth` names below the model.

    Its output and receptive field are those of the last of them, its costs their sum.
    Raises ValueError for a depth below 1.
    """
    _at_least(1, depth=depth)

    def place(numbered: tuple[int, Layer]) -> tuple[Any, ...]:
        number, layer = numbered
        names = tuple(layer.path.split("/")) if layer.path else ()
        return names[:depth] if len(names) >= depth else (*names, number)

    groups = (
        [layer for _, layer in group] for _, group in itertools.groupby(enumerate(layers), place)
    )
    return [
        dataclasses.replace(
            group[-1],
            path="/".join(group[-1].path.split("/")[:depth]),
            kind=group[0].kind if len(group) == 1 else group[0].modules[depth],
            modules=group[0].modules[: depth + 1],
            **_costs(group),
        )
        for group in groups
    ]


def total(layers: Sequence[Layer]) -> Layer:
    """Returns the sum of all costs, as one layer of kind "total"."""
    return Layer("", "total", (), **_costs(layers))


def table(layers: Sequence[Layer]) -> str:
    """Returns the layers as lines of text, with their totals."""
    header = ("layer", "kind", "output", "stride", "field", "parameters", "mult-adds", "activation")
    body = [_cells(layer) for layer in layers]
    sums = _cells(total(layers))
    last = ("total", *[""] * 4, *sums[5:])
    widths = [max(map(len, column)) for column in zip(header, *body, last, strict=True)]

    def line(cells: Sequence[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
        return "  ".join([*left, *right]).rstrip()

    rule = "-" * len(line(header))
    return "\n".join([line(header), rule, *map(line, body), rule, line(last)])


KINDS = {
    "conv_general_dilated": "conv",
    "dot_general": "dense",
    "reduce_window_max": "max_pool",
    "reduce_window_sum": "average_pool",
    "rsqrt": "norm",
}
"""Primitives that make a layer whatever stands around them."""

JOINS = {"add": "add", "mul": "multiply"}
"""Primitives that make a layer where two branches meet."""

LAYOUT = {"broadcast_in_dim", "reshape", "squeeze", "transpose"}
"""Primitives that arrange an output anew: the output of a layer is the one before."""

SHAPING = {"concatenate", "dynamic_slice", "pad", "rev", "slice", "split"}
"""Primitives that prepare what follows them, such as the padding of a convolution."""

INNER = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Primitives that only wrap others, and the parameter that holds those."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """One primitive, applied to what comes from the image or from the variables."""

    path: tuple[str, ...]
    primitive: str
    params: Mapping[str, Any]
    inputs: Sequence[Value]
    outputs: Sequence[Value]
    multiply_adds: int | None
    repeats: int

    @property
    def sees(self) -> bool:
        """Whether the image flows through it, rather than variables alone."""
        return self.outputs[0].views is not None


class _Trace:
    """The steps of a network in order; nested functions are written out."""

    def __init__(self, image_size: tuple[int, int]) -> None:
        self.image_size = image_size
        self.steps: list[_Step] = []
        self.classes: dict[tuple[str, ...], str] = {}

    def modules(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the classes along the path, the model's first."""
        return tuple(self.classes.get(path[:depth], "scope") for depth in range(len(path) + 1))

    def mark_module(
        self,
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Notes the module in the name stack of all that it does; see `nn.intercept_methods`."""
        path = context.module.path
        self.classes.setdefault(path, type(context.module).__name__)
        with jax.named_scope(f"<{'/'.join(path)}>"):
            return call(*args, **kwargs)

    def run(
        self, jaxpr: Any, inputs: Sequence[Value], path: tuple[str, ...] = (), repeats: int = 1
    ) -> list[Value]:
        """Follows the values through a jaxpr; returns its outputs."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        values |= {var: _constant(var.aval) for var in jaxpr.constvars}

        def read(atom: Any) -> Value:
            return _constant(atom.aval) if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            given = [read(atom) for atom in equation.invars]
            place = _module_path(str(equation.source_info.name_stack)) or path
            made = self._equation(equation, given, place, repeats)
            values.update(zip(equation.outvars, made, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self, equation: Any, inputs: list[Value], path: tuple[str, ...], repeats: int
    ) -> list[Value]:
        primitive, params = equation.primitive.name, equation.params
        if primitive in INNER:
            return self.run(params[INNER[primitive]], inputs, path, repeats)
        if primitive == "cond" and params.get("branches_platforms"):  # the last is the default
            return self.run(params["branches"][-1], inputs[1:], path, repeats)
        if primitive == "scan":
            return self._scan(equation, inputs, path, repeats)
        shape = equation.outvars[0].aval.shape if equation.outvars else ()
        call = Call(inputs, shape, params, self.image_size)
        outputs = _outputs(equation, inputs, views_of_outputs(primitive, call))
        if outputs and not outputs[0].constant:
            count = _multiply_adds(equation)
            self.steps.append(_Step(path, primitive, params, inputs, outputs, count, repeats))
        return outputs

    def _scan(
        self, equation: Any, inputs: list[Value], path: tuple[str, ...], repeats: int
    ) -> list[Value]:
        """What a loop does counts once for each turn; how far it sees is not known."""
        body, length = equation.params["jaxpr"], equation.params["length"]
        inner = [
            dataclasses.replace(value, shape=var.aval.shape, views=_unknown_if(value.views))
            for value, var in zip(inputs, getattr(body, "jaxpr", body).invars, strict=True)
        ]
        self.run(body, inner, path, repeats * length)
        return _outputs(equation, inputs, _unknown_if(any(value.views for value in inputs)))


def _constant(aval: Any) -> Value:
    return Value(aval.shape, aval.dtype)


def _unknown_if(seen: Any) -> tuple[View, View] | None:
    return (UNKNOWN, UNKNOWN) if seen else None


def _outputs(
    equation: Any, inputs: Sequence[Value], views: tuple[View, View] | None
) -> list[Value]:
    """Returns the outputs, which remember their variables until the image joins them."""
    variables = frozenset() if views else frozenset().union(*(one.variables for one in inputs))
    return [
        Value(var.aval.shape, getattr(var.aval, "dtype", None), views, variables)
        for var in equation.outvars
    ]


def _module_path(name_stack: str) -> tuple[str, ...]:
    """Returns the path of the innermost module that `_Trace.mark_module` noted."""
    _, _, mark = name_stack.rpartition("<")
    path, found, _ = mark.partition(">")
    return tuple(path.split("/")) if found and path else ()


def _multiply_adds(equation: Any) -> int | None:
    """Returns the multiply-adds of an equation; None for a loop that holds some."""
    params, shapes = equation.params, [atom.aval.shape for atom in equation.invars]
    if equation.primitive.name == "conv_general_dilated":
        kernel = [shapes[1][dim] for dim in params["dimension_numbers"].rhs_spec[1:]]
        return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel)
    if equation.primitive.name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        summed = [shapes[0][dim] for dim in contracting]
        return math.prod(equation.outvars[0].aval.shape) * math.prod(summed)
    inner = jax.tree.leaves(list(params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns"))
    bodies = [body for body in inner if hasattr(body, "eqns")]
    nested = [_multiply_adds(each) for body in bodies for each in body.eqns]
    return 0 if all(count == 0 for count in nested) else None


@dataclasses.dataclass
class _Piece:
    """Steps of one module that are to be one layer."""

    path: tuple[str, ...]
    kind: str | None
    steps: list[_Step]

    @property
    def output(self) -> Value:
        arranged = [step for step in self.steps if step.primitive not in LAYOUT]
        return (arranged or self.steps)[-1].outputs[0]


def _pieces(steps: Iterable[_Step]) -> Iterator[_Piece]:
    """Cuts the steps where the module changes and before each further step that makes a layer."""
    for path, run in itertools.groupby(steps, lambda step: step.path):
        run = list(run)
        seeing = [step for step in run if step.sees]
        makers = KINDS.keys() & {step.primitive for step in seeing}
        if not makers - {"rsqrt"} and any(step.primitive == "rsqrt" for step in run):
            yield _Piece(path, "norm", seeing)  # with whatever mean and variance it takes
        else:
            yield from _cut(path, seeing)


def _cut(path: tuple[str, ...], steps: Iterable[_Step]) -> Iterator[_Piece]:
    piece, origins = _Piece(path, None, []), {}
    for step in steps:
        kind = _kind(step, origins)
        if piece.kind and (kind or step.primitive in SHAPING):
            yield piece
            piece, origins = _Piece(path, None, []), {}
        piece.kind = piece.kind or kind
        piece.steps.append(step)
        sources = frozenset().union(*_sources(step, origins))
        origins |= {id(value): sources for value in step.outputs}
    yield piece


def _sources(step: _Step, origins: Mapping[int, frozenset[int]]) -> set[frozenset[int]]:
    """Returns for each input that depends on the image what it comes from before this piece."""
    return {origins.get(id(value), frozenset([id(value)])) for value in step.inputs if value.views}


def _kind(step: _Step, origins: Mapping[int, frozenset[int]]) -> str | None:
    """Returns what kind of layer the step makes, if any."""
    seeing = [value for value in step.inputs if value.views]
    dims = {view.dim for value in seeing for view in value.views or ()}
    if step.primitive in JOINS:
        return JOINS[step.primitive] if len(_sources(step, origins)) > 1 else None
    if step.primitive == "concatenate":
        channels = step.params["dimension"] not in dims
        return "concatenate" if channels and len(seeing) > 1 else None
    if step.primitive in REDUCTIONS:
        return "global_pool" if dims & set(step.params["axes"]) else None
    return KINDS.get(step.primitive)


def _as_layers(trace: _Trace, parameters: Mapping[int, tuple[tuple[str, ...], int]]) -> list[Layer]:
    """Returns the layers of the traced steps; `parameters` are owner and size by number."""
    unused = dict(parameters)
    pieces: list[_Piece] = []
    counts: list[int] = []
    made_by: dict[int, int] = {}
    for piece in _pieces(trace.steps):
        if not piece.steps:
            continue
        given = [value for step in piece.steps for value in step.inputs]
        numbers = {number for value in given for number in value.variables} & unused.keys()
        before = next((made_by[id(value)] for value in given if id(value) in made_by), None)
        if piece.kind or numbers or before is None or _changes_shape(piece, pieces[before]):
            piece.kind = piece.kind or _name(piece, trace, bool(numbers))
            before = len(pieces)
            pieces.append(piece)
            counts.append(sum(unused.pop(number)[1] for number in numbers))
        else:
            pieces[before].steps.extend(piece.steps)
        made_by |= {id(value): before for step in piece.steps for value in step.outputs}
    rows = [_layer(trace, *pair) for pair in zip(pieces, counts, strict=True)]
    return rows + [
        Layer(
            "/".join(owner),
            "unused",
            (),
            modules=trace.modules(owner),
            parameters=sum(size for _, size in sizes),
        )
        for owner, sizes in itertools.groupby(unused.values(), lambda parameter: parameter[0])
    ]


def _changes_shape(piece: _Piece, before: _Piece) -> bool:
    arranges = all(step.primitive in LAYOUT for step in piece.steps)
    return not arranges and piece.output.shape != before.output.shape


def _name(piece: _Piece, trace: _Trace, has_parameters: bool) -> str:
    """Returns the kind of a piece in which nothing makes a layer by itself."""
    if has_parameters:
        return trace.modules(piece.path)[-1]
    shaping = [
        step.primitive
        for step in piece.steps
        if step.primitive not in LAYOUT and step.outputs[0].shape != step.inputs[0].shape
    ]
    return shaping[-1] if shaping else "elementwise"


def _layer(trace: _Trace, piece: _Piece, parameters: int) -> Layer:
    value, repeats = piece.output, piece.steps[-1].repeats
    views = value.views or (UNKNOWN, UNKNOWN)
    counts = [step.multiply_adds for step in piece.steps]
    known = [view.whole or view.jump is not None for view in views]
    return Layer(
        path="/".join(piece.path),
        kind=piece.kind or "",
        output=value.shape[1:] if value.shape[:1] == (1,) else value.shape,
        modules=trace.modules(piece.path),
        strides=_pair(view.jump if view.jump is None else abs(view.jump) for view in views),
        receptive_field=_pair(
            view.extent if sure else None for view, sure in zip(views, known, strict=True)
        ),
        centre=_pair(
            view.start + (view.extent - 1) / 2 if sure else None
            for view, sure in zip(views, known, strict=True)
        ),
        sees_whole_image=all(
            view.whole and view.start <= 0 and view.end >= size
            for view, size in zip(views, trace.image_size, strict=True)
        ),
        parameters=parameters,
        multiply_adds=_sum(None if n is None else n * repeats for n in counts),
        activation_bytes=math.prod(value.shape) * value.dtype.itemsize * repeats,
    )


def _pair(numbers: Iterable[Any]) -> tuple[Any, Any]:
    first, second = numbers
    return first, second


def _sum(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count or 0 for count in known)


def _costs(layers: Sequence[Layer]) -> dict[str, Any]:
    return {
        "parameters": sum(layer.parameters for layer in layers),
        "multiply_adds": _sum(layer.multiply_adds for layer in layers),
        "activation_bytes": sum(layer.activation_bytes for layer in layers),
    }


def _cells(layer: Layer) -> list[str]:
    """Returns one row of the table; what is nought or does not exist is left blank."""
    field = "image" if layer.sees_whole_image else _by_axis(layer.receptive_field, "?")
    return [
        layer.path,
        layer.kind,
        " x ".join(map(str, layer.output)),
        _by_axis(layer.strides, ""),
        field if layer.output else "",
        f"{layer.parameters:,}" if layer.parameters else "",
        "?" if layer.multiply_adds is None else _scaled(layer.multiply_adds, 1000, DECIMAL),
        _scaled(layer.activation_bytes, 1024, BINARY),
    ]


def _by_axis(numbers: tuple[int | None, int | None], missing: str) -> str:
    """Returns height and width as one number where they are equal."""
    texts = [missing if number is None else str(number) for number in numbers]
    return texts[0] if texts[0] == texts[1] else " x ".join(texts)


DECIMAL = ("", " k", " M", " G", " T")
BINARY = (" B", " KiB", " MiB", " GiB", " TiB")


def _scaled(number: int, base: int, units: Sequence[str]) -> str:
    if not number:
        return ""
    power = min(int(math.log(number, base)), len(units) - 1)
    return f"{number / base**power:.2f}{units[power]}" if power else f"{number}{units[0]}"


def _checked(image_shape: Sequence[int]) -> tuple[int, int, int]:
    shape = tuple(image_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"image_shape={shape}: must be (height, width, channels), each at least 1")
    height, width, channels = shape
    return height, width, channels


def _at_least(limit: int, **arguments: int) -> None:
    """Raises ValueError unless every argument is an integer that reaches the limit."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < limit:
            raise ValueError(f"{name}={value!r}: must be an integer >= {limit}")
