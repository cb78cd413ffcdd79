"""Which rule propagates curvature through which operation.

A *rule* is bound to the name of an autograd node. It works in two steps, because a node's saved tensors are gone once
backward has passed it:

1. when a loss is attached, the rule is called once for every node of its kind with an :class:`Operation`; it takes from
   the node what the formula needs, and refuses here what it cannot do;
2. it returns the *formula*, a function that the engine calls during backward with the curvature of the operation's
   output (and the gradient, if the rule is ``curved``) and that returns the curvature of each input.

Built-in rules and users' rules are registered by the same function and treated alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.graph import AccumulateGrad, Node, path

#: Curvature of each input, in the order of ``node.next_functions``; None stands for exactly zero.
Diagonals = Sequence[Tensor | None]
Formula = Callable[..., Diagonals]

#: First derivatives by each input (None: not known, because that input needs none) and second derivatives by pairs.
Partials = tuple[Sequence[Any], Mapping[tuple[int, int], Any]]
PartialsRule = Callable[["Operation"], Callable[[bool], Partials]]


class UnsupportedOperationError(NotImplementedError):
    """A loss contains an operation through which no registered rule carries curvature."""


class Operation:
    """One use of an operation in a graph, as a rule sees it while the loss is being attached.

    Attributes:
        node: The autograd node, with its saved tensors alive.
        needs: For every input, whether it leads to a wanted tensor. A formula may return None for the others.
        transposed: For every input, whether it is the transpose of the tensor that receives the curvature. A rule that
            returns the curvature of that tensor directly says so by setting its entry to False; for other rules the
            engine transposes.
        method: ``"hesscale"``, ``"hesscale_gn"``, ``"hesscale_rank1"`` or ``"bl89"``.
        curved: Whether the formula takes the gradient, as registered; a rule may set it to False for a use that has no
            second derivative, which spares a hook. Its formula is then called as ``formula(h)``.
    """

    __slots__ = ("_following", "curved", "method", "needs", "node", "transposed")

    def __init__(
        self, node: Node, following: Any, needs: list[bool], transposed: list[bool], method: str, curved: bool
    ) -> None:
        self.node = node
        self._following = following
        self.curved = curved
        self.needs = needs
        self.transposed = transposed
        self.method = method

    def input_shape(self, i: int) -> torch.Size:
        """Shape of input ``i``: what a curvature must be summed to where the forward pass broadcast."""
        child, output = self._following[i]
        if type(child) is AccumulateGrad:
            shape: torch.Size = child.variable.shape
            return shape
        return torch.Size(child._input_metadata[output].shape)

    def input_meta(self, i: int) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of input ``i``."""
        child, output = self._following[i]
        meta = child.variable if type(child) is AccumulateGrad else child._input_metadata[output]
        return meta.dtype, meta.device

    def output_shape(self, i: int = 0) -> torch.Size:
        """Shape of output ``i``."""
        return torch.Size(self.node._input_metadata[i].shape)

    def unsupported(self, why: str) -> UnsupportedOperationError:
        """The error to raise when the operation is known but this use of it is not supported."""
        return UnsupportedOperationError(f"{self.node.name()}: {why}")


@dataclass(frozen=True, slots=True)
class Rule:
    """How curvature passes one kind of operation. See :func:`register_rule` for the fields."""

    name: str
    build: Callable[[Operation], Formula]
    curved: bool
    multi_output: bool
    view: bool
    partials: PartialsRule | None
    bilinear: bool
    reduces: bool
    approximate: str


_rules: dict[str, Rule] = {}
_listeners: list[Callable[[], None]] = []
_rule_of_type: dict[type, Rule] = {}  # generated nodes have a Python type each, and comparing types is much faster


def register_rule(
    *names: str,
    curved: bool = False,
    multi_output: bool = False,
    view: bool = False,
    partials: PartialsRule | None = None,
    bilinear: bool = False,
    reduces: bool = False,
    approximate: str = "",
) -> Callable[[Callable[[Operation], Formula]], Callable[[Operation], Formula]]:
    """Registers how curvature passes an operation, by the name of its autograd node.

    With ``y = f(x)``, ``g = dL/dy`` and ``h ~ diag(d2L/dy2)``, the formula must return for each input

        ``h_x = sum_j (dy_j/dx)^2 h_j + sum_j g_j d2y_j/dx^2``

    The decorated function receives an :class:`Operation` when a loss is attached, takes what it needs from
    ``operation.node`` (``node._saved_x``; for a ``torch.autograd.Function`` its context, ``node.saved_tensors``), and
    returns the formula. The formula of a plain rule is called as ``formula(h)``, and only where ``h`` is not zero. The
    formula of a ``curved`` rule is called as ``formula(g, h)`` where either may be None: ``h`` if it is exactly zero,
    ``g`` if the second-derivative term is dropped (Gauss-Newton inside the network). Gradients are off in a formula,
    and it must return new tensors or views of ``h``, never ``g`` itself. A later registration replaces an earlier one.

    Args:
        names: Names of autograd nodes, as ``tensor.grad_fn.name()`` prints them. For a ``torch.autograd.Function``
            called ``Scale`` it is ``"ScaleBackward"``.
        curved: The operation has a second derivative, so its formula needs the gradient.
        multi_output: The operation has several differentiable outputs; ``g`` and ``h`` are then tuples with an entry
            (or None) for each.
        view: The operation only rearranges or casts one tensor. A parameter stays a parameter behind it, which decides
            where Gauss-Newton stops keeping second derivatives.
        partials: For an elementwise operation its derivatives, so that the engine can join it with its neighbours where
            paths meet; see ``hesscale_lightning.curvature.elementwise``, which registers such operations by these
            alone.
        bilinear: The operation has mixed second derivatives in two of its inputs, as a product has. They play no part
            in a rule; the coverage report tells where they are lost because both inputs come from one tensor.
        reduces: For an operation with partials, whether its entries may also be summed, as by a loss: paths may meet in
            it, but it is not joined with what follows.
        approximate: What the formula leaves out, if it is not exact; shown by the coverage report.

    Example:
        >>> import torch
        >>> from hesscale_lightning.curvature import backward, register_rule
        >>> class Scale(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x, factor):
        ...         ctx.factor = factor
        ...         return x * factor
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         return grad * ctx.factor, None
        >>> @register_rule("ScaleBackward")
        ... def scale(operation):
        ...     factor = operation.node.factor
        ...     return lambda h: (h * factor**2,)  # one entry for each tensor that the function takes
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> backward(Scale.apply(w, 3.0).square().sum())
        >>> w.hess_diag
        tensor([18., 18.])
    """

    def register(build: Callable[[Operation], Formula]) -> Callable[[Operation], Formula]:
        for name in names:
            _rules[name] = Rule(name, build, curved, multi_output, view, partials, bilinear, reduces, approximate)
        _rule_of_type.clear()
        for listener in _listeners:
            listener()
        return build

    if not names:
        raise ValueError('register_rule needs at least one node name, for example register_rule("TanhBackward0")')
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"register_rule takes names of autograd nodes, got {name!r}; use it as @register_rule('Name')"
            )
    return register


def on_registration(listener: Callable[[], None]) -> None:
    """Calls ``listener`` after every registration, so that what was derived from the rules can be dropped."""
    _listeners.append(listener)


def registered_rules() -> dict[str, Rule]:
    """Every rule by node name, in alphabetical order."""
    return dict(sorted(_rules.items()))


def find_rule(node: Node) -> Rule | None:
    """The rule of ``node``, or None."""
    kind = type(node)
    rule = _rule_of_type.get(kind)
    if rule is None:
        name = node.name()
        rule = _rules.get(name)
        if rule is not None and kind.__name__ == name:  # nodes without a type of their own share one
            _rule_of_type[kind] = rule
    return rule


_ADVICE = {
    "CompiledFunctionBackward": (
        "a compiled model is one opaque operation: run it eagerly for the steps that need curvature, for example under "
        'torch.compiler.set_stance("force_eager")'
    ),
    "CheckpointFunctionBackward": (
        "reentrant checkpointing hides the operations and parameters inside: use "
        "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
    ),
}


def no_rule(root: Node, node: Node, hint: str = "") -> UnsupportedOperationError:
    """The error for a node without a rule: its name, the way to it from the loss, and what to do."""
    name = node.name()
    way = " -> ".join(step.name() for step in path(root, node))
    advice = hint or _ADVICE.get(name)
    if not advice and "BackwardBackward" in name:
        advice = (
            "the loss contains a gradient that was computed with create_graph=True, as a gradient penalty does; "
            "curvature of such a loss is not supported"
        )
    if not advice:
        advice = (
            f'register a rule for it with @hesscale_lightning.register_rule("{name}"), or take the parameters behind '
            "it out of params"
        )
    return UnsupportedOperationError(f"no curvature rule for {name}. Path from the loss: {way}. What to do: {advice}.")
