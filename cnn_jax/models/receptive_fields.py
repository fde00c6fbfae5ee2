"""What each element of an array sees of the image: one rule for each primitive of JAX.

A rule takes a `Call` and the axis of the image (0: height, 1: width) and returns the `View` that
the outputs have of that axis. A primitive without a rule gives `UNKNOWN`, never a guess.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias


@dataclasses.dataclass(frozen=True)
class View:
    """What the elements of an array see of one axis of the image.

    Element i along `dim` sees the `extent` pixels from pixel `start + jump * i` on, some of them
    perhaps in the padding. With `whole`, every element sees the pixels from `start` on. A `dim`
    without a `jump` mixes positions with something else, as flattening does: its elements see
    parts, unlike each other, of the pixels from `start` on.
    """

    dim: int | None
    jump: int | None
    start: int
    extent: int
    whole: bool = False

    @property
    def end(self) -> int:
        """The pixel behind the last that element 0 sees."""
        return self.start + self.extent


UNKNOWN = View(dim=None, jump=None, start=0, extent=-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array while a network is traced.

    Attributes:
      views: of the height and the width of the image; None where it does not depend on the image.
      variables: numbers of the parameters and statistics that it was computed from, until it meets
        the image.
    """

    shape: tuple[int, ...]
    dtype: Any
    views: tuple[View, View] | None = None
    variables: frozenset[int] = frozenset()

    @property
    def constant(self) -> bool:
        """Whether it is the same for every image and all parameters."""
        return self.views is None and not self.variables


@dataclasses.dataclass(frozen=True)
class Call:
    """One primitive, applied: its inputs, its first output's shape, its parameters."""

    inputs: Sequence[Value]
    shape: tuple[int, ...]
    params: Mapping[str, Any]
    image_size: tuple[int, int]


Rule: TypeAlias = Callable[[Call, int], View]
OfOneInput: TypeAlias = Callable[[Call, int, View, int], View]


def views_of_outputs(primitive: str, call: Call) -> tuple[View, View] | None:
    """Returns the view that the outputs have of both axes; None if none depends on the image."""
    if all(value.views is None for value in call.inputs):
        return None
    rule = RULES.get(primitive, _no_rule)
    return rule(call, 0), rule(call, 1)


def covered(view: View, length: int, size: int) -> View:
    """Returns the pixels within the image that `length` elements see together."""
    if view == UNKNOWN:
        return UNKNOWN
    reach = 0 if view.whole or view.jump is None else view.jump * (length - 1)
    low = max(view.start + min(0, reach), 0)
    high = min(view.end + max(0, reach), size)
    return View(None, None, low, max(high - low, 0), whole=True)


def _everywhere(view: View) -> View:
    """Returns the view of an array whose elements all see what element 0 sees."""
    return view if view == UNKNOWN else dataclasses.replace(view, dim=None, jump=None, whole=True)


def _within(inner: View, outer: View) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


def _union(a: View, b: View, shape: Sequence[int], size: int) -> View:
    """Returns what elements of that shape see that see what `a` and what `b` see."""
    if a == b:
        return a
    dims = {view.dim for view in (a, b)} - {None}
    jumps = {view.jump for view in (a, b)} - {None}
    if UNKNOWN in (a, b) or len(dims) > 1 or len(jumps) > 1:
        return UNKNOWN
    if a.whole != b.whole:  # the one that is everywhere the same has to hold the other
        everywhere, other = (a, b) if a.whole else (b, a)
        length = 1 if other.dim is None else shape[other.dim]
        if not _within(covered(other, length, size), covered(everywhere, 1, size)):
            return UNKNOWN
        start, end = everywhere.start, everywhere.end
    elif not a.whole and a.jump != b.jump:
        return UNKNOWN
    else:
        start, end = min(a.start, b.start), max(a.end, b.end)
    dim, jump = next(iter(dims), None), next(iter(jumps), None)
    return View(dim, jump, start, end - start, whole=a.whole or b.whole)


def _each(rule: OfOneInput) -> Rule:
    """Returns the rule for outputs that see what any of the inputs sees."""

    def union(call: Call, axis: int) -> View:
        views = [
            rule(call, number, value.views[axis], call.image_size[axis])
            for number, value in enumerate(call.inputs)
            if value.views is not None
        ]
        join = functools.partial(_union, shape=call.shape, size=call.image_size[axis])
        return functools.reduce(join, views)

    return union


def _no_rule(call: Call, axis: int) -> View:
    """What is the same everywhere stays so; of anything else nothing is known."""

    def same_everywhere(call: Call, number: int, view: View, size: int) -> View:
        return view if view.whole and view.dim is None else UNKNOWN

    return _each(same_everywhere)(call, axis)


def _elementwise(call: Call, number: int, view: View, size: int) -> View:
    shape = call.inputs[number].shape
    if view.dim is not None and shape[view.dim] == 1 != call.shape[view.dim]:
        return _everywhere(view)
    return view


def _window(view: View, dim: int, *, size: int, stride: int, dilation: int, low: int) -> View:
    """Returns the view of windows of `size` elements along the view's axis, `low` of padding."""
    if view.whole:
        jump = None if view.jump is None else view.jump * stride
        return dataclasses.replace(view, dim=dim, jump=jump)
    if view.jump is None:
        untouched = (size, stride, low) == (1, 1, 0)
        return dataclasses.replace(view, dim=dim) if untouched else UNKNOWN
    reach = view.jump * (size - 1) * dilation
    start = view.start - view.jump * low + min(0, reach)
    return View(dim, view.jump * stride, start, view.extent + abs(reach))


def _convolution(call: Call, number: int, view: View, size: int) -> View:
    if number == 1:  # a kernel that depends on the image
        return _everywhere(view) if view.whole else UNKNOWN
    if view.dim is None:
        return view
    numbers = call.params["dimension_numbers"]
    position = numbers.lhs_spec.index(view.dim)
    if call.params["batch_group_count"] != 1:
        return UNKNOWN
    if position == 0:
        return dataclasses.replace(view, dim=numbers.out_spec[0])
    if position == 1:  # mixed with the channels
        whole = call.params["feature_group_count"] == 1
        return covered(view, call.inputs[0].shape[view.dim], size) if whole else UNKNOWN
    spatial = position - 2
    if call.params["lhs_dilation"][spatial] != 1:
        return UNKNOWN
    return _window(
        view,
        numbers.out_spec[position],
        size=call.inputs[1].shape[numbers.rhs_spec[position]],
        stride=int(call.params["window_strides"][spatial]),
        dilation=int(call.params["rhs_dilation"][spatial]),
        low=int(call.params["padding"][spatial][0]),
    )


def _pooling(call: Call, number: int, view: View, size: int) -> View:
    if view.dim is None:
        return view
    if call.params["base_dilation"][view.dim] != 1:
        return UNKNOWN
    return _window(
        view,
        view.dim,
        size=int(call.params["window_dimensions"][view.dim]),
        stride=int(call.params["window_strides"][view.dim]),
        dilation=int(call.params["window_dilation"][view.dim]),
        low=int(call.params["padding"][view.dim][0]),
    )


def _dot(call: Call, number: int, view: View, size: int) -> View:
    contracting, batch = call.params["dimension_numbers"]
    if view.dim is None:
        return view
    if view.dim in contracting[number]:
        # A constant matrix is mostly a sparse one, such as the weights of a bilinear resize.
        if call.inputs[1 - number].constant:
            return UNKNOWN
        return covered(view, call.inputs[number].shape[view.dim], size)
    taken = [{*contracting[side], *batch[side]} for side in (0, 1)]
    free = [
        [dim for dim in range(len(call.inputs[side].shape)) if dim not in taken[side]]
        for side in (0, 1)
    ]
    order = [(number, dim) for dim in batch[number]]
    order += [(side, dim) for side in (0, 1) for dim in free[side]]
    return dataclasses.replace(view, dim=order.index((number, view.dim)))


def _reduction(call: Call, number: int, view: View, size: int) -> View:
    if view.dim is None:
        return view
    axes = call.params["axes"]
    if view.dim in axes:
        return covered(view, call.inputs[number].shape[view.dim], size)
    return dataclasses.replace(view, dim=view.dim - sum(axis < view.dim for axis in axes))


def _squeeze(call: Call, number: int, view: View, size: int) -> View:
    if view.dim is None:
        return view
    gone = call.params["dimensions"]
    if view.dim in gone:
        return _everywhere(view)
    return dataclasses.replace(view, dim=view.dim - sum(dim < view.dim for dim in gone))


def _broadcast(call: Call, number: int, view: View, size: int) -> View:
    if number or view.dim is None:
        return view
    dim = call.params["broadcast_dimensions"][view.dim]
    if call.inputs[0].shape[view.dim] == 1 != call.shape[dim]:
        return _everywhere(view)
    return dataclasses.replace(view, dim=dim)


def _transpose(call: Call, number: int, view: View, size: int) -> View:
    if view.dim is None:
        return view
    return dataclasses.replace(view, dim=call.params["permutation"].index(view.dim))


def _reshape(call: Call, number: int, view: View, size: int) -> View:
    """An axis that is kept keeps its view; one of a single element sees the same everywhere."""
    if view.dim is None:
        return view
    before = call.inputs[number].shape
    length, inner = before[view.dim], math.prod(before[view.dim + 1 :])
    if length == 1:
        return _everywhere(view)
    for dim, size_after in enumerate(call.shape):
        following = math.prod(call.shape[dim + 1 :])
        if following == inner and size_after == length:
            return dataclasses.replace(view, dim=dim)
        if following <= inner and size_after * following >= inner * length:  # flattened
            if view.whole:
                return dataclasses.replace(view, dim=None, jump=None)
            hull = covered(view, length, size)
            return hull if hull == UNKNOWN else dataclasses.replace(hull, dim=dim, whole=False)
    return dataclasses.replace(view, dim=None, jump=None) if view.whole else UNKNOWN


def _slice(call: Call, number: int, view: View, size: int) -> View:
    if view.dim is None:
        return view
    strides = call.params["strides"]
    return _window(
        view,
        view.dim,
        size=1,
        stride=int(strides[view.dim]) if strides else 1,
        dilation=1,
        low=-int(call.params["start_indices"][view.dim]),
    )


def _dynamic_slice(call: Call, number: int, view: View, size: int) -> View:
    kept = view.dim is None or call.inputs[0].shape[view.dim] == call.shape[view.dim]
    return view if number == 0 and kept else UNKNOWN


def _split(call: Call, number: int, view: View, size: int) -> View:
    return UNKNOWN if view.dim == call.params["axis"] else view


def _pad(call: Call, number: int, view: View, size: int) -> View:
    if view.dim is None:
        return view
    low, _, interior = map(int, call.params["padding_config"][view.dim])
    if interior:
        return UNKNOWN
    return _window(view, view.dim, size=1, stride=1, dilation=1, low=low)


def _reverse(call: Call, number: int, view: View, size: int) -> View:
    if view.dim is None or view.jump is None or view.whole:
        return view
    if view.dim not in call.params["dimensions"]:
        return view
    last = view.start + view.jump * (call.inputs[number].shape[view.dim] - 1)
    return View(view.dim, -view.jump, last, view.extent)


def _concatenate(call: Call, axis: int) -> View:
    """Along the channels: what any part sees. Along the image: the longest part and its borders.

    A border (zeros, or pixels reflected or repeated) must not see further into the image than its
    own length and one more, and does not count; other parts must go on where the longest one ends.
    """
    dim, size = call.params["dimension"], call.image_size[axis]
    parts: list[tuple[int, int, View]] = []
    offset = 0
    for value in call.inputs:
        length = value.shape[dim]
        if value.views is not None and length:
            parts.append((offset, length, value.views[axis]))
        offset += length
    if not any(view.dim == dim for _, _, view in parts) or all(view.whole for *_, view in parts):
        join = functools.partial(_union, shape=call.shape, size=size)
        return functools.reduce(join, [view for _, _, view in parts])
    if any(view == UNKNOWN for _, _, view in parts):
        return UNKNOWN

    first, count, longest = max(parts, key=lambda part: part[1])
    if longest.jump is None or longest.whole or longest.dim != dim:
        return UNKNOWN
    result = dataclasses.replace(longest, start=longest.start - longest.jump * first)
    for offset, length, view in parts:
        beside = min(length + 1, count)
        inside = 0 if offset < first else count - beside
        near = dataclasses.replace(longest, start=longest.start + longest.jump * inside)
        borders = _within(covered(view, length, size), covered(near, beside, size))
        goes_on = view.jump is not None and (
            dataclasses.replace(view, start=view.start - view.jump * offset) == result
        )
        if not (borders or goes_on):
            return UNKNOWN
    return result


# fmt: off
ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "div",
    "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "imag",
    "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul",
    "name", "ne", "neg", "nextafter", "not", "or", "pow", "real", "reduce_precision", "rem",
    "round", "rsqrt", "select_n", "sharding_constraint", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub",
    "tan", "tanh", "xor",
)
# fmt: on

# fmt: off
REDUCTIONS = (
    "argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod",
    "reduce_sum", "reduce_xor",
)
# fmt: on

POOLINGS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _each(_elementwise)),
    **dict.fromkeys(REDUCTIONS, _each(_reduction)),
    **dict.fromkeys(POOLINGS, _each(_pooling)),
    "broadcast_in_dim": _each(_broadcast),
    "concatenate": _concatenate,
    "conv_general_dilated": _each(_convolution),
    "dot_general": _each(_dot),
    "dynamic_slice": _each(_dynamic_slice),
    "pad": _each(_pad),
    "reshape": _each(_reshape),
    "rev": _each(_reverse),
    "slice": _each(_slice),
    "split": _each(_split),
    "squeeze": _each(_squeeze),
    "transpose": _each(_transpose),
}
"""What every primitive with a known reach does to a view."""
