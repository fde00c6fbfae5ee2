"""Training a part of a network: what is frozen keeps its weights and its running statistics."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import optax

from cnn_jax.errors import UserError, nearest

Frozen: TypeAlias = Callable[[str], bool]
"""Whether a parameter is frozen, by its path: "stage1_block1/conv1/conv/kernel"."""


def train_only(patterns: str | Sequence[str], params: Any) -> Frozen:
    """Returns what freezes every parameter whose path none of the regular `patterns` begins.

    A pattern ends where a name does: "head" is "head/kernel" and "head/bias", "stage4_block.*" all
    blocks of the fourth stage. Without patterns nothing is frozen. Raises UserError for a pattern
    that is no regular expression, or that names nothing among `params`.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    paths = [_path(path) for path, _ in jax.tree.leaves_with_path(params)]
    parts = {path.partition("/")[0] for path in paths}
    matches = []
    for pattern in patterns:
        try:
            match = re.compile(f"(?:{pattern})(?:/|$)").match
        except re.error as error:
            raise UserError(f"{pattern!r}: no regular expression, {error}") from error
        if not any(map(match, paths)):
            raise UserError(
                f"{pattern!r}: names no parameter{nearest(pattern, parts)}; "
                f"the parts are {', '.join(sorted(parts))}"
            )
        matches.append(match)
    return lambda path: bool(matches) and not any(match(path) for match in matches)


def freeze_updates(tx: optax.GradientTransformation, frozen: Frozen) -> Any:
    """Returns the optimiser that leaves frozen parameters alone, weight decay included.

    It keeps no momentum for them.
    """

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: "frozen" if frozen(_path(path)) else "trained", params
        )

    return optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def stop_gradients(params: Any, frozen: Frozen) -> Any:
    """Returns `params` with gradients that stop at frozen ones: none is computed for them."""
    return jax.tree.map_with_path(
        lambda path, leaf: jax.lax.stop_gradient(leaf) if frozen(_path(path)) else leaf, params
    )


def frozen_statistics(frozen: Frozen) -> Any:
    """Returns a context in which a BatchNorm with a frozen scale uses its running statistics.

    They stay as they are, and what it returns is a fixed function of its input. This is what
    `module.eval()` does to a frozen part in torch. It holds for any linen module with flax's
    argument `use_running_average`.
    """

    def call(
        method: Callable[..., Any],
        arguments: tuple[Any, ...],
        named: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        normalizes = context.method_name == "__call__" and hasattr(module, "use_running_average")
        if not normalizes or not frozen("/".join([*module.path, "scale"])):
            return method(*arguments, **named)
        if module.use_running_average is None:  # said in the call, by position or by name
            return method(arguments[0], **{**named, "use_running_average": True})
        if module.use_running_average:
            return method(*arguments, **named)
        return module.clone(parent=module.scope, use_running_average=True)(*arguments, **named)

    return nn.intercept_methods(call)


def _path(path: Sequence[Any]) -> str:
    """Returns the names along the path; the box of a partitioned parameter has none."""
    return "/".join(str(key.key) for key in path if hasattr(key, "key"))
