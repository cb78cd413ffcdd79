"""Curvature that rides on the ordinary backward pass.

:func:`attach` walks the graph of a loss once, lets every operation's rule take what it needs, and hooks the few nodes whose
gradient a rule needs. ``loss.backward()`` then delivers these gradients; each time one arrives, the curvature is swept down
the graph as far as it can be, which frees what the rules held, and when backward ends the diagonals are written to
``p.hess_diag``. Nothing is recomputed and no second graph is built.

Who owns what (a cycle through C++ would never be collected, and would keep every activation of every step):

    loss tensor -> Attachment -> formulas -> saved tensors -> nodes -> hooks ...> weak reference to the Attachment

so that dropping the loss drops it all, also if backward raised or never ran.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Variable

from hesscale_lightning.curvature.elementwise import Composite, composite_formula, find_composite
from hesscale_lightning.curvature.graph import AccumulateGrad, Edge, Node, Trace, trace
from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.registry import Formula, Operation, Rule, find_rule, no_rule

Method = Literal["hesscale", "hesscale_gn", "bl89"]
METHODS: tuple[str, ...] = get_args(Method)

_OWNER = "_hesscale_attachment"  # the attribute in which a loss keeps its attachment alive
_Output = tuple[Node, int]  # a node and the number of one of its outputs
_AWAITED = object()  # stands for a gradient that backward has not delivered yet

_SWEEP_EVERY = 4  # gradients between sweeps: one long sweep is faster than many short ones, but holds what it has not passed

# A node of no graph: every node runs in a plain backward(), so this one "will" too; under inputs= it will not.
_FOREIGN = torch.empty((), requires_grad=True).expand(1).grad_fn
_will_execute = torch._C._will_engine_execute_node

# A step: formula, whether it takes the gradient, the cell of each input (-1: not wanted), which inputs are to be transposed
# (None: none), the cells of its outputs if it has several, the node's name. Cells hold the curvature that has arrived so
# far; step i reads cell i.
_Step = tuple[Formula, bool, list[int], "list[bool] | None", "list[int] | None", str]


class Attachment:
    """One armed backward pass. It is spent when that pass ends; :meth:`remove` disarms it earlier."""

    __slots__ = (
        "__weakref__", "_cells", "_device_type", "_gradients", "_handles", "_kept", "_lock", "_next", "_sinks", "_started",
        "_steps",
    )  # fmt: skip

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._steps: list[_Step | None] = []  # in the order of backward; None: a leaf, or done
        self._gradients: list[Any] = []  # for each step: _AWAITED, or what its formula takes as g
        self._cells: list[Any] = []
        self._sinks: list[tuple[int, Node, Tensor]] = []  # cell, node and tensor of each diagonal to write
        self._kept: set[int] = set()  # cells of inner tensors, read again at the end
        self._handles: list[Any] = []
        self._next = 0
        self._started = False
        self._lock = threading.Lock()

    @property
    def active(self) -> bool:
        """Whether a backward pass will still deliver diagonals."""
        return bool(self._handles)

    def remove(self) -> None:
        """Disarms: takes every hook off the graph and lets go of all tensors. Harmless when already spent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._steps = []
        self._gradients.clear()  # in place: the hooks share it
        self._cells = []
        self._sinks = []

    def _begin(self) -> bool:
        """Called by the first hook of a backward pass. False: this pass does not accumulate gradients."""
        if not _will_execute(_FOREIGN):  # only some nodes run
            try:
                self._sinks = [sink for sink in self._sinks if _will_execute(sink[1])]
            except RuntimeError:
                return False  # torch.autograd.grad(): stay armed for the backward() to come
        self._started = True
        Variable._execution_engine.queue_callback(partial(_finish, weakref.ref(self)))  # type: ignore[attr-defined]
        return True

    def _sweep(self, final: bool) -> None:
        """Carries curvature down the graph until a step still waits for its gradient."""
        steps, gradients, cells, kept = self._steps, self._gradients, self._cells, self._kept
        for i in range(self._next, len(steps)):
            step = steps[i]
            if step is None:
                continue
            g = gradients[i]
            if g is _AWAITED:
                if not final:
                    self._next = i
                    return
                continue  # backward(inputs=...) never ran this node
            steps[i] = gradients[i] = None
            formula, curved, targets, transposed, outputs, name = step
            if outputs is None:
                h = cells[i]
                if i not in kept:
                    cells[i] = None
                if g is not None:
                    g = g[0]
                    if g is not None and g.dtype in HALF:
                        g = g.float()
            else:
                if g is not None:
                    g = _full_precision(g)
                h = tuple([cells[cell] for cell in outputs])
                for cell in outputs:
                    if cell not in kept:
                        cells[cell] = None
                if all([part is None for part in h]):
                    h = None
            if h is None and g is None:
                continue
            try:
                results = formula(g, h) if curved else formula(h)
            except Exception as error:
                error.add_note(f"while carrying curvature through {name}")
                raise
            if transposed is not None:
                results = [r.t() if t and r is not None else r for r, t in zip(results, transposed, strict=True)]
            if len(results) != len(targets):
                raise RuntimeError(
                    f"the rule for {name} returned {len(results)} curvatures for {len(targets)} inputs; it must return one "
                    "(or None) for each entry of node.next_functions"
                )
            for cell, result in zip(targets, results):  # noqa: B905 (checked above, and strict costs more)
                if cell >= 0 and result is not None:
                    earlier = cells[cell]
                    cells[cell] = result if earlier is None else earlier + result
        self._next = len(steps)

    def _run(self, final: bool = False) -> None:
        if torch.is_autocast_enabled(self._device_type):
            with torch.autocast(self._device_type, enabled=False), torch.no_grad():
                self._sweep(final)
        elif torch.is_grad_enabled():
            with torch.no_grad():
                self._sweep(final)
        else:
            self._sweep(final)

    def _write(self) -> None:
        """Adds what arrived at each sink to its ``hess_diag``, in memory of its own, laid out like the tensor."""
        cells = self._cells
        taken: set[int] = set()
        for cell, _, tensor in self._sinks:
            h = cells[cell]
            dtype = tensor.dtype if tensor.dtype not in HALF else torch.float32
            if h is None:
                h = torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
            elif not h.is_same_size(tensor):
                raise RuntimeError(
                    f"curvature of shape {tuple(h.shape)} arrived at a tensor of shape {tuple(tensor.shape)}: "
                    "a rule on the way returned the wrong shape"
                )
            elif h._base is not None or id(h) in taken or h.dtype is not dtype or h.stride() != tensor.stride():
                h = torch.empty_like(tensor, dtype=dtype, requires_grad=False).copy_(h)
            else:
                taken.add(id(h))
            earlier = getattr(tensor, "hess_diag", None)
            tensor.hess_diag = h if earlier is None else earlier + h  # type: ignore[attr-defined]


def _full_precision(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """The gradients of several outputs as a formula takes them; None where nothing arrived."""
    if all([g is None for g in grads]):
        return None
    return tuple([g.float() if g is not None and g.dtype in HALF else g for g in grads])


def _on_gate(ref: weakref.ref[Attachment], i: int, grads: tuple[Tensor | None, ...]) -> None:
    """The hook that fires first. ``i`` is the step whose gradient it brings; -1: none."""
    attachment = ref()
    if attachment is None:
        raise RuntimeError(
            "the tensor given to attach() no longer exists, and its curvature went with it; attach the tensor on which "
            "backward() is called, or keep the attached one alive until then"
        )
    if attachment._started:
        attachment.remove()
        raise RuntimeError(
            "an earlier backward pass over this graph did not finish, so its curvature is incomplete; call attach() again "
            "before this backward()"
        )
    if attachment._begin() and i >= 0:
        attachment._gradients[i] = grads


def _on_sweep(ref: weakref.ref[Attachment], i: int, grads: tuple[Tensor | None, ...]) -> None:
    """The hook of every few steps, which sweeps what can be swept, to free what it holds."""
    attachment = ref()
    if attachment is None or not attachment._started:
        return
    attachment._gradients[i] = grads
    if not attachment._lock.acquire(blocking=False):
        return  # another device's thread is sweeping; it, or the end, will go on
    try:
        attachment._run()
    except StopIteration as error:  # Lightning would take it for the end of the data
        attachment.remove()
        raise RuntimeError("a curvature rule raised StopIteration") from error
    except BaseException:
        attachment.remove()
        raise
    finally:
        attachment._lock.release()


def _finish(ref: weakref.ref[Attachment]) -> None:
    attachment = ref()
    if attachment is None or not attachment._started:
        return
    try:
        with torch.no_grad():
            attachment._run(final=True)
            attachment._write()
    except StopIteration as error:
        raise RuntimeError("a curvature rule raised StopIteration") from error
    finally:
        attachment.remove()


# -- before backward ----------------------------------------------------------------------------------------------------


def attach(loss: Tensor, params: Iterable[Tensor] | None = None, *, method: Method = "hesscale") -> Attachment:
    """Arms the graph of ``loss``, so that the following ``loss.backward()`` also adds to ``p.hess_diag``.

    For ``y = f(x, ...)`` with ``g = dL/dy`` and ``h ~ diag(d2L/dy2)``, every operation passes on

        ``h_x = sum_j (dy_j/dx)^2 h_j + sum_j g_j d2y_j/dx^2``

    Nothing is written before backward ends; if it raises, no diagonal has changed. Diagonals add up over several backward
    passes exactly as ``.grad`` does, and belong to the user: set ``p.hess_diag = None`` to start anew (``zero_grad`` of
    this package's optimizers does).

    Args:
        loss: A real tensor with one element that requires grad: the one on which ``backward()`` will be called.
        params: The tensors that receive a diagonal, each of the tensor's shape, in its dtype (float32 for half precision).
            None takes every leaf that requires grad. Frozen tensors, and those that the loss does not reach, get none. A
            tensor inside the graph may be named as well, for example a network's output.
        method: ``"hesscale"``; ``"hesscale_gn"``, which drops second derivatives inside the network, that is, at every
            operation that has a parameterised operation between itself and the loss; ``"bl89"``, Becker and LeCun's
            recursion, which takes softmax and log-softmax for pointwise operations.

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
    root = _root_of(loss, method)
    found, inner = _find(root, params)
    attachment = Attachment(loss.device.type)
    if found.index[root] < 0:
        return attachment
    ref = weakref.ref(attachment)
    hooked = _prepare(attachment, root, found, inner, method)
    # Everything that can be refused has been: only now is the graph touched.
    store = attachment._gradients.__setitem__
    handles = attachment._handles
    for k, (node, i, gate) in enumerate(hooked):
        if gate:
            hook = partial(_on_gate, ref, i)
        elif (k + 1) % _SWEEP_EVERY:
            hook = partial(store, i)  # runs without a Python frame
        else:
            hook = partial(_on_sweep, ref, i)
        handles.append(node.register_prehook(hook))
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
        backward_kwargs: Passed to ``torch.Tensor.backward``. With ``inputs=`` only those receive a gradient and a diagonal.

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


def _root_of(loss: Tensor, method: str) -> Node:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a torch.Tensor, got {type(loss).__name__}")
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not require grad, so there is no graph to read: was it computed under torch.no_grad(), "
            "detached, or from parameters that are all frozen?"
        )
    if loss.numel() != 1:
        raise ValueError(f"the loss must have one element, got shape {tuple(loss.shape)}: reduce it with mean() or sum()")
    if loss.is_complex():
        raise TypeError(f"the loss must be real, got {loss.dtype}")
    root = loss.grad_fn
    if root is None:
        raise ValueError("the loss is a leaf tensor: there is no operation between it and the parameters")
    earlier = getattr(loss, _OWNER, None)
    if earlier is not None and earlier.active:
        if not earlier._started:
            raise RuntimeError(
                "this loss is attached already, and attaching it again would count its curvature twice: attach once per "
                "backward(), or remove() the earlier attachment"
            )
        earlier.remove()  # its backward failed
    return root


def _find(root: Node, params: Iterable[Tensor] | None) -> tuple[Trace, dict[_Output, Tensor]]:
    """Traces the graph, and returns the wanted tensors that are no leaves by the output they are."""
    if params is None:
        return trace(root, None), {}
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, got a single tensor: write [tensor]")
    wanted = {id(p): p for p in params}
    found = trace(root, wanted)
    if found.leaves == len(wanted):
        return found, {}
    inner: dict[_Output, Tensor] = {}
    for p in wanted.values():
        if not isinstance(p, Tensor):
            raise TypeError(
                f"params must contain tensors, got {type(p).__name__}; for a module pass module.parameters(), "
                "for an optimizer the tensors of its param_groups"
            )
        if p.grad_fn is not None:
            inner[(p.grad_fn, p.output_nr)] = p
    return (trace(root, wanted, inner) if inner else found), inner


def _prepare(
    attachment: Attachment, root: Node, found: Trace, inner: dict[_Output, Tensor], method: str
) -> list[tuple[Node, int, bool]]:
    """Fills the attachment's steps, and returns its hooks: node, step, whether it fires first."""
    nodes, index, edges = found.nodes, found.index, found.edges
    last = len(nodes) - 1
    steps, gradients, sinks = attachment._steps, attachment._gradients, attachment._sinks
    rules: list[Rule | None] = []
    for node in reversed(nodes):
        if type(node) is AccumulateGrad:
            rules.append(None)
        else:
            rule = find_rule(node)
            if rule is None:
                raise no_rule(root, node)
            rules.append(rule)
    inside = _inside_network(found, rules) if method == "hesscale_gn" else None
    joined = _Joined(found, rules, inside, inner)
    beyond: dict[_Output, int] = {}  # cells of outputs after the first
    hooked: list[tuple[Node, int, bool]] = []
    single_file = True  # whether all of backward has passed through one node at a time so far
    try:
        for i, rule in enumerate(rules):
            node = nodes[last - i]
            if rule is None:
                variable = node.variable
                if variable.is_complex():
                    raise TypeError(f"complex parameters are not supported, got one of dtype {variable.dtype}")
                sinks.append((i, node, variable))
            if rule is None or last - i in joined.members:
                steps.append(None)
                gradients.append(None)
                continue
            inputs = edges[node]
            needs = [index[child] >= 0 for child, _, _ in inputs]
            composite = joined.ending_in(last - i) if rule.partials is not None and needs.count(True) > 1 else None
            if composite is not None:
                curved = True
                formula, inputs = joined.formula(composite, method)
            elif i == 0 and not rule.curved:
                curved, formula = False, _unused  # no curvature arrives at the root, and none is made there
            else:
                operation = Operation(node, needs, [flip for _, _, flip in inputs], method, rule.curved)
                formula = rule.build(operation)
                curved = operation.curved
                inputs = [
                    (child, output, flip) for (child, output, _), flip in zip(inputs, operation.transposed, strict=True)
                ]
            targets: list[int] = []
            turned: list[bool] | None = None
            for child, output, flip in inputs:
                position = index[child]
                if position < 0 or output == 0:
                    targets.append(last - position if position >= 0 else -1)
                else:
                    targets.append(beyond.setdefault((child, output), last + 1 + len(beyond)))
                if flip and turned is None:
                    turned = [flip for _, _, flip in inputs]
            outputs = None
            if rule.multi_output:
                count = len(node._input_metadata)
                outputs = [i, *(beyond.setdefault((node, k), last + 1 + len(beyond)) for k in range(1, count))]
            elif beyond and any(owner is node for owner, _ in beyond):
                raise no_rule(root, node, "its rule covers the first output only, and another output is used here")
            steps.append((formula, curved, targets, turned, outputs, rule.name))
            if curved and (inside is None or not inside[i]):
                gradients.append(_AWAITED)
                hooked.append((node, i, single_file and not hooked))
            else:
                gradients.append(None)
            if single_file and sum([cell >= 0 for cell in targets]) > 1:
                single_file = False
                if not hooked:
                    hooked.append((root, -1, True))
    except RuntimeError as error:
        if "through the graph a second time" in str(error):
            raise RuntimeError(
                "the graph of this loss was freed by an earlier backward(): attach before backward, and once per backward; "
                "to go through one graph twice use retain_graph=True"
            ) from None
        raise
    if not hooked:
        hooked.append((root, -1, True))
    for (node, output), tensor in inner.items():
        position = index.get(node, -1)
        if position >= 0:
            cell = last - position if output == 0 else beyond.setdefault((node, output), last + 1 + len(beyond))
            attachment._kept.add(cell)
            sinks.append((cell, node, tensor))
    attachment._cells.extend([None] * (last + 1 + len(beyond)))
    return hooked


def _unused(*_: Any) -> tuple[()]:
    return ()


class _Joined:
    """The elementwise operations of a graph that are carried together; see :mod:`.elementwise`."""

    def __init__(
        self, found: Trace, rules: list[Rule | None], inside: list[bool] | None, inner: dict[_Output, Tensor]
    ) -> None:
        self._found = found
        self._rules = rules
        self._inside = inside
        self._wanted = {node for node, _ in inner}
        self._consumers: dict[int, list[int]] | None = None
        self.members: set[int] = set()  # positions of the nodes inside a composite, without its last

    def ending_in(self, position: int) -> Composite | None:
        nodes, index, edges = self._found.nodes, self._found.index, self._found.edges
        last = len(nodes) - 1

        def joins(below: int) -> bool:
            rule, node = self._rules[last - below], nodes[below]
            if rule is None or rule.partials is None or node in self._wanted:
                return False
            # Gauss-Newton keeps or drops the second derivative of a composite as a whole.
            return self._inside is None or self._inside[last - below] == self._inside[last - position]

        inputs = [edge for edge in edges[nodes[position]] if index[edge[0]] >= 0]
        if len(set(inputs)) == len(inputs) and not any([joins(index[child]) for child, _, _ in inputs]):
            return None
        if self._consumers is None:
            self._consumers = {k: [] for k in range(len(nodes))}
            for k, node in enumerate(nodes):
                for child, _, _ in edges.get(node, ()):  # a leaf has none
                    if index[child] >= 0:
                        self._consumers[index[child]].append(k)
        composite = find_composite(self._found, position, joins, self._consumers)
        if composite is not None:
            self.members.update(composite.members[:-1])
        return composite

    def formula(self, composite: Composite, method: str) -> tuple[Formula, list[Edge]]:
        found = self._found
        operations, partials = [], []
        for member in composite.members:
            node = found.nodes[member]
            rule = self._rules[len(self._rules) - 1 - member]
            assert rule is not None and rule.partials is not None
            needs = [found.index[child] >= 0 for child, _, _ in found.edges[node]]
            flips = [flip for _, _, flip in found.edges[node]]
            operations.append(Operation(node, needs, flips, method, True))
            partials.append(rule.partials)
        return composite_formula(composite, found, operations, partials), composite.sources


def _inside_network(found: Trace, rules: list[Rule | None]) -> list[bool]:
    """For each step, whether a parameterised operation lies between it and the loss."""
    nodes, index, edges = found.nodes, found.index, found.edges
    last = len(nodes) - 1
    parameter = [False] * len(nodes)  # by index: a wanted leaf, or views and casts of one
    for position, node in enumerate(nodes):
        rule = rules[last - position]
        parameter[position] = rule is None or (
            rule.view and any([index[child] >= 0 and parameter[index[child]] for child, _, _ in edges[node]])
        )
    inside = [False] * len(nodes)
    for i, rule in enumerate(rules):
        if rule is None:
            continue
        children = [index[child] for child, _, _ in edges[nodes[last - i]] if index[child] >= 0]
        if inside[i] or (not rule.view and any([parameter[child] for child in children])):
            for child in children:
                inside[last - child] = True
    return inside
