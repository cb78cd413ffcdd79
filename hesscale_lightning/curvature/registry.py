"""Which rule propagates curvature through which operation.

A *rule* is bound to the name of an autograd node. It is a function of one use of the operation, whose saved tensors and
numbers it names, of the gradient ``g`` and of the curvature ``h`` at its output; its text is the formula, and it
returns the curvature of each input. It is run as it stands on tensors, and on symbols to write it into a program.

Built-in rules and users' rules are registered by the same function and treated alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hesscale_lightning.curvature.elementwise import PartialsRule, alone, partials_of
from hesscale_lightning.curvature.graph import Node, path
from hesscale_lightning.curvature.operation import Operation, UnsupportedOperationError
from hesscale_lightning.curvature.values import ZERO, Value

RuleFunction = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """How curvature passes one kind of operation. See :func:`register_rule` for the fields.

    Attributes:
        name: The autograd node's name.
        function: What was registered, for its documentation.
        carry: From the operation, g and h to the curvature of each input.
        curved: Whether, or by which inputs, there is a second derivative, or a function that tells of a use whether.
        partials: For an elementwise operation, its derivatives.
        source: Whether it brings curvature of its own in place of what arrives.
    """

    name: str
    function: RuleFunction
    carry: Callable[[Operation, Value, Value], Any]
    curved: bool | Sequence[int] | Callable[[Operation], bool]
    multi_output: bool
    view: bool
    partials: PartialsRule | None
    bilinear: bool | Callable[[Operation], bool]
    reduces: bool
    approximate: str
    check: Callable[[Operation], None] | None
    prepare: Callable[[Operation], Any] | None
    source: bool = False

    def attach(self, op: Operation) -> None:
        """Checks a use of the operation, and prepares it."""
        if self.check is not None:
            self.check(op)
        if self.prepare is not None:
            op.prepared = self.prepare(op)

    def makes_curvature(self, op: Operation) -> bool:
        """Whether this use of the operation has a second derivative by an input that is wanted."""
        curved = self.curved
        if isinstance(curved, bool):
            return curved
        if callable(curved):
            return curved(op)
        return any(op.needs[i] for i in curved if i < len(op.needs))

    def is_bilinear(self, op: Operation) -> bool:
        """Whether this use of the operation has mixed second derivatives in two of its inputs."""
        return self.bilinear(op) if callable(self.bilinear) else self.bilinear


_rules: dict[str, Rule] = {}
_listeners: list[Callable[[], None]] = []
_rule_of_type: dict[type, Rule] = {}  # generated nodes have a Python type each, and comparing types is much faster


def register_rule(
    *names: str,
    elementwise: bool = False,
    curved: bool | Sequence[int] | Callable[[Operation], bool] | None = None,
    multi_output: bool = False,
    view: bool = False,
    partials: RuleFunction | None = None,
    bilinear: bool | Callable[[Operation], bool] = False,
    reduces: bool = False,
    approximate: str = "",
    check: Callable[[Operation], None] | None = None,
    prepare: Callable[[Operation], Any] | None = None,
) -> Callable[[RuleFunction], RuleFunction]:
    """Registers how curvature passes an operation, by the name of its autograd node.

    With ``y = f(x)``, ``g = dL/dy`` and ``h ~ diag(d2L/dy2)``, a rule returns for each input

        ``h_x = sum_j (dy_j/dx)^2 h_j + sum_j g_j d2y_j/dx^2``

    The decorated function is one of these:

    - ``rule(op, h)``, for an operation without second derivatives; called only where ``h`` is not zero;
    - ``rule(op, g, h)``, where there are some. Either may be ``ZERO``: ``h`` where no curvature arrives, as directly
      below the loss, ``g`` where the second-derivative term is dropped (Gauss-Newton inside the network). Zero adds
      nothing and takes products with it, so that a formula need not ask;
    - ``rule(op)`` with ``elementwise=True``, which returns ``f', f''`` (None: zero wherever it exists), or for several
      inputs their derivatives, and those by pairs ``{(i, j): f_ij}`` with ``i <= j``, where a pair left out is zero;
    - ``rule(op)`` without it, for a *source*: the operation brings curvature of its own, such as the Fisher information
      of a distribution's parameters, in place of the loss's. What is above it is not computed if nothing else needs it.

    ``op`` is an :class:`Operation`: ``op.tensor(name)`` and ``op.number(name)`` are what the node has saved. A rule
    returns one tensor for each input (alone, if there is one input), None or ``ZERO`` where it is zero. It must not
    change a tensor in place, and must not decide by a tensor's values, only by shapes and numbers; what cannot be
    written so goes into a function decorated with ``opaque``. A later registration replaces an earlier one.

    Args:
        names: Names of autograd nodes, as ``tensor.grad_fn.name()`` prints them. For a ``torch.autograd.Function``
            called ``Scale`` it is ``"ScaleBackward"``.
        elementwise: Every output entry depends on one entry of each input, up to broadcasting. The engine can then join
            it with its neighbours where paths meet.
        curved: By which inputs there is a second derivative: True, False, their numbers, or a function that tells of an
            operation. None takes it from the function: True where it is called with ``g``, and for elementwise ones.
        multi_output: The operation has several differentiable outputs; ``g`` and ``h`` are then tuples with an entry
            (or ``ZERO``) for each.
        view: The operation only rearranges or casts one tensor. A parameter stays a parameter behind it, which decides
            where Gauss-Newton stops keeping second derivatives.
        partials: What ``rule(op)`` would return under ``elementwise=True``, where a faster rule for the operation
            standing alone is decorated.
        bilinear: The operation has mixed second derivatives in two of its inputs, as a product has (or a function that
            tells of a use whether). They play no part
            in a rule; the coverage report tells where they are lost because both inputs come from one tensor.
        reduces: For an elementwise operation, whether its entries may also be summed, as by a loss: paths may meet in
            it, but it is not joined with what follows. The sum's factors belong to the partials.
        approximate: What the formula leaves out, if it is not exact; shown by the coverage report.
        check: Called with the operation when a loss is attached; raises ``op.unsupported(why)`` for a use that the rule
            cannot do, before any gradient is written. Like a rule it decides by shapes and numbers.
        prepare: Called likewise, at every attach; what it returns is ``op.prepared``. For what must look at values.

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
        ... def scale(op, h):
        ...     return h * op.number("factor") ** 2
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> backward(Scale.apply(w, 3.0).square().sum())
        >>> w.hess_diag
        tensor([18., 18.])
    """

    def register(function: RuleFunction) -> RuleFunction:
        arguments = len(inspect.signature(function).parameters)
        derivatives: Any = None
        if elementwise:
            derivatives = partials_of(function)
            carry = alone(derivatives)
        elif arguments == 3:
            carry = function
        elif arguments == 2:
            carry = _without_gradient(function)
        elif arguments == 1:
            carry = _of_operation_alone(function)
        else:
            raise TypeError(
                f"a rule is a function (op, h), or (op, g, h) if it needs the gradient, or (op) for a source or with "
                f"elementwise=True; "
                f"{getattr(function, '__name__', function)!r} takes {arguments} arguments"
            )
        if partials is not None:
            derivatives = partials_of(partials)
        bends = curved if curved is not None else arguments == 3 or elementwise
        for name in names:
            _rules[name] = Rule(
                name,
                function,
                carry,
                bends,
                multi_output,
                view,
                derivatives,
                bilinear,
                reduces,
                approximate,
                check,
                prepare,
                arguments == 1 and not elementwise,
            )
        _rule_of_type.clear()
        for listener in _listeners:
            listener()
        return function

    if not names:
        raise ValueError('register_rule needs at least one node name, for example register_rule("TanhBackward0")')
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"register_rule takes names of autograd nodes, got {name!r}; use it as @register_rule('Name')"
            )
    return register


def _without_gradient(function: RuleFunction) -> Callable[[Operation, Value, Value], Any]:
    def carry(op: Operation, g: Value, h: Value) -> Any:
        return ZERO if h is ZERO else function(op, h)

    return carry


def _of_operation_alone(function: RuleFunction) -> Callable[[Operation, Value, Value], Any]:
    def carry(op: Operation, g: Value, h: Value) -> Any:
        return function(op)

    return carry


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
