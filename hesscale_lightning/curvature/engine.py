"""Curvature that rides on the ordinary backward pass.

:func:`attach` walks the graph of a loss once, lets every operation's rule take what it needs, and hooks the few nodes
whose gradient a rule needs. ``loss.backward()`` then delivers these gradients; the curvature is swept down the graph
every few of them, which frees what the rules held, and when backward ends the diagonals are written to ``p.hess_diag``.
Nothing is recomputed and no second graph is built.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, GraphExecGroup

from hesscale_lightning.curvature.attachment import AWAITED, PLAIN, Attachment, on_gate, on_sweep
from hesscale_lightning.curvature.composite import Composite, works_along_rows
from hesscale_lightning.curvature.composite_formula import composite_formula
from hesscale_lightning.curvature.graph import Node, trace
from hesscale_lightning.curvature.plan import Output, Plan, PlanCache, make_plan, refuse_hidden_parameters, weight_of
from hesscale_lightning.curvature.rank_one import Recipe, recipe_for
from hesscale_lightning.curvature.rank_one.steps import Parts
from hesscale_lightning.curvature.registry import Formula, Operation

Method = Literal["hesscale", "hesscale_gn", "bl89", "hesscale_rank1"]
METHODS: tuple[str, ...] = get_args(Method)

_OWNER = "_hesscale_attachment"  # the attribute in which a loss keeps its attachment alive
# Gradients between sweeps: one long sweep is faster than many short ones, but holds what it has not passed.
_SWEEP_EVERY = 4
_plans = PlanCache()
_current_group, _set_group = torch._C._get_graph_exec_group, torch._C._set_graph_exec_group


def attach(loss: Tensor, params: Iterable[Tensor] | None = None, *, method: Method = "hesscale") -> Attachment:
    """Arms the graph of ``loss``, so that the following ``loss.backward()`` also adds to ``p.hess_diag``.

    For ``y = f(x, ...)`` with ``g = dL/dy`` and ``h ~ diag(d2L/dy2)``, every operation passes on

        ``h_x = sum_j (dy_j/dx)^2 h_j + sum_j g_j d2y_j/dx^2``

    Nothing is written before backward ends; if it raises, no diagonal has changed. Diagonals add up over several
    backward passes exactly as ``.grad`` does, and live as long: where a parameter had no gradient when backward began,
    because ``zero_grad`` took it, its diagonal starts anew as well. With ``zero_grad(set_to_none=False)`` set
    ``p.hess_diag = None`` yourself; this package's optimizers do.

    Args:
        loss: A real tensor with one element that requires grad: the one on which ``backward()`` will be called.
        params: The tensors that receive a diagonal, each of the tensor's shape, in its dtype (float32 for half
            precision). None takes every leaf that requires grad. Frozen tensors, and those that the loss does not
            reach, get none. A tensor inside the graph may be named as well, for example a network's output.
        method: ``"hesscale"``; ``"hesscale_gn"``, which drops second derivatives inside the network, that is, at every
            operation that has a parameterised operation between itself and the loss; ``"bl89"``, Becker and LeCun's
            recursion, which takes softmax and log-softmax for pointwise operations; ``"hesscale_rank1"``, a closer
            estimate for about the same cost: in each sample the part of the Hessian along the gradient is taken through
            the network exactly, and only the remainder by the recursion above, as far down as samples do not mix.

    Returns:
        The armed pass. It need not be kept; its ``remove()`` disarms.

    Raises:
        UnsupportedOperationError: An operation between the loss and a wanted tensor has no rule.
        ValueError, TypeError: The loss is not a scalar that requires grad, or an argument is wrong.
        RuntimeError: The graph was freed by an earlier backward, or is armed already.

    Example:
        >>> import torch
        >>> from hesscale_lightning.curvature import attach
        >>> model = torch.nn.Linear(3, 2)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.randint(2, (8,)))
        >>> _ = attach(loss)
        >>> loss.backward()
        >>> model.weight.hess_diag.shape
        torch.Size([2, 3])

    Source: Elsayed, Farrahi, Dangel, Mahmood, "Revisiting Scalable Hessian Diagonal Approximations for Applications in
    Reinforcement Learning", ICML 2024, arXiv 2406.03276; Becker and LeCun, 1989.
    """
    root = root_of(loss, method)
    attachment = Attachment(loss.device.type)
    wanted = _by_id(params)
    key = (type(root), method, None if wanted is None else len(wanted))
    hooks = None
    try:
        for plan, nodes, following in _plans.matching(key, root, wanted):
            if wanted is not None and len(plan.leaves) != len(wanted) and _inner(wanted):
                break
            hooks = _arm(attachment, plan, nodes, following, {}, method)
            if hooks is not None:
                break
        if hooks is None:
            inner = {} if wanted is None else _inner(wanted)
            found = trace(root, wanted, inner)
            refuse_hidden_parameters(root, found)
            if found.index[root] < 0:
                return attachment
            plan = make_plan(root, found, list(inner), method)
            _plans.add(key, plan)
            following = [node.next_functions for node in found.nodes]
            hooks = _arm(attachment, plan, found.nodes, following, inner, method)
            assert hooks is not None  # the plan was made for this graph
    except RuntimeError as error:
        if "through the graph a second time" in str(error):
            raise RuntimeError(
                "the graph of this loss was freed by an earlier backward(): attach before backward, and once per "
                "backward; to go through one graph twice use retain_graph=True"
            ) from None
        raise
    # Everything that can be refused has been: only now is the graph touched.
    attachment._handles = [node.register_prehook(hook) for node, hook in hooks]
    setattr(loss, _OWNER, attachment)
    return attachment


def backward(
    loss: Tensor, params: Iterable[Tensor] | None = None, *, method: Method = "hesscale", **backward_kwargs: Any
) -> None:
    """``loss.backward(**backward_kwargs)`` that also adds to ``p.hess_diag``: :func:`attach` and ``backward`` in one.

    Args:
        loss: As for :func:`attach`.
        params: As for :func:`attach`.
        method: As for :func:`attach`.
        backward_kwargs: Passed to ``torch.Tensor.backward``. With ``inputs=`` only those receive gradient and diagonal.

    Example:
        >>> import torch
        >>> from hesscale_lightning.curvature import backward
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> backward((w**3).sum())
        >>> w.grad, w.hess_diag
        (tensor([ 3., 12.]), tensor([ 6., 12.]))
    """
    attachment = attach(loss, params, method=method)
    try:
        loss.backward(**backward_kwargs)
    finally:
        attachment.remove()


def root_of(loss: Tensor, method: str) -> Node:
    """The node at which the graph of ``loss`` begins; raises if the loss or the method cannot be used."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a torch.Tensor, got {type(loss).__name__}")
    root = loss.grad_fn
    if root is None or loss.numel() != 1 or loss.dtype.is_complex:
        raise _unsuitable(loss)
    earlier = loss.__dict__.get(_OWNER)
    if earlier is not None and earlier.active:
        if not earlier._started:
            raise RuntimeError(
                "this loss is attached already, and attaching it again would count its curvature twice: attach once "
                "per backward(), or remove() the earlier attachment"
            )
        earlier.remove()  # its backward failed
    return root


def _unsuitable(loss: Tensor) -> Exception:
    if not loss.requires_grad:
        return ValueError(
            "the loss does not require grad, so there is no graph to read: was it computed under torch.no_grad(), "
            "detached, or from parameters that are all frozen?"
        )
    if loss.numel() != 1:
        return ValueError(
            f"the loss must have one element, got shape {tuple(loss.shape)}: reduce it with mean() or sum()"
        )
    if loss.is_complex():
        return TypeError(f"the loss must be real, got {loss.dtype}")
    return ValueError("the loss is a leaf tensor: there is no operation between it and the parameters")


def wanted_tensors(params: Iterable[Tensor] | None) -> tuple[dict[int, Tensor] | None, dict[Output, Tensor]]:
    """The wanted tensors by id (None: every leaf), and those that are no leaves by the output they are."""
    wanted = _by_id(params)
    return wanted, {} if wanted is None else _inner(wanted)


def _by_id(params: Iterable[Tensor] | None) -> dict[int, Tensor] | None:
    if params is None:
        return None
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, got a single tensor: write [tensor]")
    return {id(p): p for p in params}


def _inner(wanted: dict[int, Tensor]) -> dict[Output, Tensor]:
    """The wanted tensors that are no leaves, by the output they are."""
    inner: dict[Output, Tensor] = {}
    for p in wanted.values():
        if not isinstance(p, Tensor):
            raise TypeError(
                f"params must contain tensors, got {type(p).__name__}; for a module pass module.parameters(), "
                "for an optimizer the tensors of its param_groups"
            )
        if p.grad_fn is not None:
            inner[(p.grad_fn, p.output_nr)] = p
    return inner


def _arm(
    attachment: Attachment,
    plan: Plan,
    nodes: list[Node],
    following: list[Any],
    inner: dict[Output, Tensor],
    method: str,
) -> list[tuple[Node, Callable[..., None]]] | None:
    """Lets the rules take what they need from this graph's nodes, and returns which nodes to hook with what.

    None if the plan does not fit after all, because an operation works along another dimension than when it was made.
    """
    # A checkpointed block recomputes itself once for all rules that ask for its tensors, and not for each.
    if _current_group() is None:
        _set_group(GraphExecGroup())
        try:
            return _armed(attachment, plan, nodes, following, inner, method)
        except CheckpointError:
            pass  # two rules ask for one tensor, which a group hands out once: recompute for each
        finally:
            _set_group(None)
    return _armed(attachment, plan, nodes, following, inner, method)


def _armed(
    attachment: Attachment,
    plan: Plan,
    nodes: list[Node],
    following: list[Any],
    inner: dict[Output, Tensor],
    method: str,
) -> list[tuple[Node, Callable[..., None]]] | None:
    """:func:`_arm`, apart from what it does for checkpointed blocks."""
    if plan.declined and any(works_along_rows(nodes[position], following[position]) for position in plan.declined):
        return None
    if plan.weights and any((weight_of(nodes[position]) == 0) is not zero for position, zero in plan.weights):
        return None
    formulas: list[Formula | None] = []
    gradients: list[Any] = []
    awaited: list[int] = []
    recipe: Recipe | None = None
    if method == "hesscale_rank1":
        recipe = recipe_for(plan, nodes, following, cells_of(plan, nodes, inner))
        parts = Parts(recipe.samples, recipe.heads)
    for k, (cell, rule, composite, needs, flips, turns, _, _, inside) in enumerate(plan.steps):
        if composite is not None:
            members = _operations(composite, nodes, following, method)
            joined = composite_formula(composite, members)
            if joined is None:
                return None
            if recipe is not None and (use := recipe.uses[k]) is not None:
                joined = parts.of_composite(use, joined, members)
            formulas.append(joined)
            curved = True
            if turns:
                attachment._turned = {**attachment._turned, k: flips}
        elif cell == 0 and not rule.curved:  # no curvature arrives at the root, and none is made there
            formulas.append(None)
            curved = False
        else:
            if turns:
                flips = flips.copy()
            operation = Operation(nodes[cell], following[cell], needs, flips, method, rule.curved)
            if recipe is not None and (use := recipe.uses[k]) is not None:
                formulas.append(parts.formula(use, operation, rule))
                curved = True
            else:
                formulas.append(rule.build(operation))
                curved = operation.curved
            if turns and True in flips:
                attachment._turned = {**attachment._turned, k: flips}
        if not curved:
            gradients.append(PLAIN)
        elif inside:
            gradients.append(None)
        else:
            gradients.append(AWAITED)
            awaited.append(k)
    attachment._steps = plan.steps
    attachment._formulas = formulas
    attachment._gradients = gradients
    attachment._cells = [None] * plan.cells
    attachment._leaves = [(cell, nodes[cell]) for cell in plan.leaves]
    attachment._inner = {**attachment._inner, **cells_of(plan, nodes, inner)}

    ref = weakref.ref(attachment)
    store = gradients.__setitem__
    sweep_every = _SWEEP_EVERY if recipe is None else 2 * _SWEEP_EVERY  # with a gradient for each linear layer as well
    hooks: list[tuple[Node, Callable[..., None]]] = []
    if not awaited or awaited[0] > plan.narrow:
        hooks.append((nodes[0], partial(on_gate, ref, -1)))
    for k in awaited:
        if not hooks:
            hook: Callable[..., None] = partial(on_gate, ref, k)
        elif (len(hooks) + 1) % sweep_every:
            hook = partial(store, k)  # runs without a Python frame
        else:
            hook = partial(on_sweep, ref, k)
        hooks.append((nodes[plan.steps[k].cell], hook))
    return hooks


def cells_of(plan: Plan, nodes: list[Node], inner: dict[Output, Tensor]) -> dict[int, tuple[Node, Tensor]]:
    """The wanted tensors that are no leaves, and their nodes, by cell."""
    cells = {}
    for (node, output), tensor in inner.items():
        if node in nodes:
            cell = nodes.index(node)
            cells[cell if output == 0 else plan.beyond[(cell, output)]] = node, tensor
    return cells


def _operations(composite: Composite, nodes: list[Node], following: list[Any], method: str) -> list[Operation]:
    return [
        Operation(nodes[m.position], following[m.position], m.needs, [False] * len(m.needs), method, True)
        for m in composite.members
    ]
