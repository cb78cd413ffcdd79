"""Curvature that rides on the ordinary backward pass.

:func:`attach` walks the graph of a loss once, lets every operation's rule take what it needs, and hooks the few nodes
whose gradient a rule needs. ``loss.backward()`` then delivers these gradients; each time one arrives, the curvature is
swept down the graph as far as it can be, which frees what the rules held, and when backward ends the diagonals are
written to
``p.hess_diag``. Nothing is recomputed and no second graph is built.

Who owns what (a cycle through C++ would never be collected, and would keep every activation of every step):

    loss tensor -> Attachment -> formulas -> saved tensors -> nodes -> hooks ...> weak reference to the Attachment

so that dropping the loss drops it all, also if backward raised or never ran.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Variable

from hesscale_lightning.curvature.elementwise import composite_formula
from hesscale_lightning.curvature.graph import Node, trace
from hesscale_lightning.curvature.plan import Output, Plan, PlanCache, make_plan
from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.registry import Formula, Operation

Method = Literal["hesscale", "hesscale_gn", "bl89"]
METHODS: tuple[str, ...] = get_args(Method)

_OWNER = "_hesscale_attachment"  # the attribute in which a loss keeps its attachment alive
_AWAITED = object()  # stands for a gradient that backward has not delivered yet

_SWEEP_EVERY = (
    4  # gradients between sweeps: one long sweep is faster than many short ones, but holds what it has not passed
)

# A node of no graph: every node runs in a plain backward(), so this one "will" too; under inputs= it will not.
_FOREIGN: Any = torch.empty((), requires_grad=True).expand(1).grad_fn
_plans = PlanCache()
_will_execute = torch._C._will_engine_execute_node
# Below autograd nothing is recorded, as under no_grad, and every operation takes one dispatch less.
_without_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", torch.no_grad)

# A step: formula, whether it takes the gradient, the cell of each input (-1: not wanted), which inputs are to be
# transposed (None: none), the cells of its outputs if it has several, the node's name. Cells hold the curvature that
# has arrived so far; step i reads cell i.
_Step = tuple[Formula, bool, list[int], "list[bool] | None", "list[int] | None", str]


class Attachment:
    """One armed backward pass. It is spent when that pass ends; :meth:`remove` disarms it earlier."""

    __slots__ = (
        "__weakref__", "_cells", "_device_type", "_gradients", "_handles", "_inner", "_leaves", "_lock", "_next",
        "_started", "_steps",
    )  # fmt: skip

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._steps: list[_Step | None] = []  # in the order of backward; None: nothing to do, or done
        self._gradients: list[Any] = []  # for each step: _AWAITED, or what its formula takes as g
        self._cells: list[Any] = []
        self._leaves: list[tuple[int, Node]] = []  # cell and node of each leaf that receives a diagonal
        self._inner: dict[int, tuple[Node, Tensor]] = {}  # node and tensor of each other tensor that does, by cell
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
        self._leaves = []
        self._inner = {}

    def _begin(self) -> bool:
        """Called by the first hook of a backward pass. False: this pass does not accumulate gradients."""
        if not _will_execute(_FOREIGN):  # only some nodes run
            try:
                self._leaves = [leaf for leaf in self._leaves if _will_execute(leaf[1])]
                self._inner = {cell: sink for cell, sink in self._inner.items() if _will_execute(sink[0])}
            except RuntimeError:
                return False  # torch.autograd.grad(): stay armed for the backward() to come
        self._started = True
        Variable._execution_engine.queue_callback(partial(_finish, weakref.ref(self)))
        return True

    def _sweep(self, final: bool) -> None:
        """Carries curvature down the graph until a step still waits for its gradient."""
        steps, gradients, cells, inner = self._steps, self._gradients, self._cells, self._inner
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
                if i not in inner:
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
                    if cell not in inner:
                        cells[cell] = None
                if all(part is None for part in h):
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
            elif len(results) != len(targets):
                raise RuntimeError(
                    f"the rule for {name} returned {len(results)} curvatures for {len(targets)} inputs; it must return "
                    "one (or None) for each entry of node.next_functions"
                )
            for cell, result in zip(targets, results):  # noqa: B905 (checked above, and strict costs more)
                if cell >= 0 and result is not None:
                    earlier = cells[cell]
                    cells[cell] = result if earlier is None else earlier + result
        self._next = len(steps)

    def _run(self, final: bool = False) -> None:
        if torch.is_autocast_enabled(self._device_type):
            with torch.autocast(self._device_type, enabled=False), _without_autograd():
                self._sweep(final)
        else:
            with _without_autograd():
                self._sweep(final)

    def _write(self) -> None:
        """Adds what arrived at each wanted tensor to its ``hess_diag``: memory of its own, laid out like the tensor."""
        cells = self._cells
        taken: set[int] = set()
        wanted = [(cell, node.variable) for cell, node in self._leaves]
        if self._inner:
            wanted += [(cell, tensor) for cell, (_, tensor) in self._inner.items()]
        for cell, tensor in wanted:
            h = cells[cell]
            if h is None:
                h = torch.zeros_like(tensor, dtype=_diagonal_dtype(tensor), requires_grad=False)
            else:
                address = h.data_ptr()
                if (
                    address in taken
                    or h.stride() != tensor.stride()
                    or h.dtype is not tensor.dtype
                    or h.shape != tensor.shape
                    or tensor.dtype in HALF
                ):
                    if h.shape != tensor.shape:
                        raise RuntimeError(
                            f"curvature of shape {tuple(h.shape)} arrived at a tensor of shape {tuple(tensor.shape)}: "
                            "a rule on the way returned the wrong shape"
                        )
                    h = torch.empty_like(tensor, dtype=_diagonal_dtype(tensor), requires_grad=False).copy_(h)
                else:
                    taken.add(address)
            earlier = getattr(tensor, "hess_diag", None)
            tensor.hess_diag = h if earlier is None else earlier + h


def _diagonal_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in HALF else tensor.dtype


def _full_precision(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """The gradients of several outputs as a formula takes them; None where nothing arrived."""
    if all(g is None for g in grads):
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
            "an earlier backward pass over this graph did not finish, so its curvature is incomplete; call attach() "
            "again before this backward()"
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
        with _without_autograd():
            attachment._run(final=True)
            attachment._write()
    except StopIteration as error:
        raise RuntimeError("a curvature rule raised StopIteration") from error
    finally:
        attachment.remove()


# -- before backward -------------------------------------------------------------------------------------------------


def attach(loss: Tensor, params: Iterable[Tensor] | None = None, *, method: Method = "hesscale") -> Attachment:
    """Arms the graph of ``loss``, so that the following ``loss.backward()`` also adds to ``p.hess_diag``.

    For ``y = f(x, ...)`` with ``g = dL/dy`` and ``h ~ diag(d2L/dy2)``, every operation passes on

        ``h_x = sum_j (dy_j/dx)^2 h_j + sum_j g_j d2y_j/dx^2``

    Nothing is written before backward ends; if it raises, no diagonal has changed. Diagonals add up over several
    backward passes exactly as ``.grad`` does, and belong to the user: set ``p.hess_diag = None`` to start anew
    (``zero_grad`` of this package's optimizers does).

    Args:
        loss: A real tensor with one element that requires grad: the one on which ``backward()`` will be called.
        params: The tensors that receive a diagonal, each of the tensor's shape, in its dtype (float32 for half
            precision). None takes every leaf that requires grad. Frozen tensors, and those that the loss does not
            reach, get none. A tensor inside the graph may be named as well, for example a network's output.
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
    root = root_of(loss, method)
    attachment = Attachment(loss.device.type)
    wanted = _by_id(params)
    key = (type(root), method, None if wanted is None else len(wanted))
    hit = _plans.find(key, root, wanted)
    try:
        if hit is not None and (wanted is None or len(hit[0].leaves) == len(wanted) or not _inner(wanted)):
            hooks = _arm(attachment, *hit, {}, method)
        else:
            inner = {} if wanted is None else _inner(wanted)
            found = trace(root, wanted, inner)
            if found.index[root] < 0:
                return attachment
            plan = make_plan(root, found, list(inner), method)
            _plans.add(key, plan)
            hooks = _arm(attachment, plan, found.nodes, [node.next_functions for node in found.nodes], inner, method)
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
) -> list[tuple[Node, Callable[..., None]]]:
    """Lets the rules take what they need from this graph's nodes, and returns which nodes to hook with what."""
    steps: list[_Step | None] = [None] * plan.size
    gradients: list[Any] = [None] * plan.size
    awaited: list[int] = []  # steps, by their number in the plan
    for number, (cell, rule, composite, needs, flips, turns, targets, outputs, inside) in enumerate(plan.steps):
        if composite is not None:
            curved = True
            formula = composite_formula(
                composite,
                [
                    Operation(nodes[m.position], following[m.position], m.needs, [False] * len(m.needs), method, True)
                    for m in composite.members
                ],
            )
        elif cell == 0 and not rule.curved:
            continue  # no curvature arrives at the root, and none is made there
        else:
            if turns:
                flips = flips.copy()
            operation = Operation(nodes[cell], following[cell], needs, flips, method, rule.curved)
            formula = rule.build(operation)
            curved = operation.curved
        steps[cell] = (formula, curved, targets, flips if turns and True in flips else None, outputs, rule.name)
        if curved and not inside:
            gradients[cell] = _AWAITED
            awaited.append(number)
    for (node, output), tensor in inner.items():
        if node in nodes:
            cell = nodes.index(node)
            attachment._inner[cell if output == 0 else plan.beyond[(cell, output)]] = (node, tensor)
    attachment._steps = steps
    attachment._gradients = gradients
    attachment._leaves = [(cell, nodes[cell]) for cell in plan.leaves]
    attachment._cells = [None] * plan.cells

    ref = weakref.ref(attachment)
    store = gradients.__setitem__
    hooks: list[tuple[Node, Callable[..., None]]] = []
    if not awaited or awaited[0] > plan.narrow:
        hooks.append((nodes[0], partial(_on_gate, ref, -1)))
    for number in awaited:
        cell = plan.steps[number].cell
        if not hooks:
            hook: Callable[..., None] = partial(_on_gate, ref, cell)
        elif (len(hooks) + 1) % _SWEEP_EVERY:
            hook = partial(store, cell)  # runs without a Python frame
        else:
            hook = partial(_on_sweep, ref, cell)
        hooks.append((nodes[cell], hook))
    return hooks
