"""An armed backward pass: what the hooks bring, the sweep down the graph, and the writing of the diagonals.

Who owns what (a cycle through C++ would never be collected, and would keep every activation of every step):

    loss tensor -> Attachment -> formulas -> saved tensors -> nodes -> hooks ...> weak reference to the Attachment

so that dropping the loss drops it all, also if backward raised or never ran.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence, Set
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from hesscale_lightning.curvature.graph import Node
from hesscale_lightning.curvature.plan import Step
from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.registry import Formula

AWAITED = object()  # stands for a gradient that backward has not delivered yet
PLAIN = object()  # stands in its place for a formula that takes none

# A node of no graph: every node runs in a plain backward(), so this one "will" too; under inputs= it will not.
_FOREIGN: Any = torch.empty((), requires_grad=True).expand(1).grad_fn
_will_execute = torch._C._will_engine_execute_node
# Below autograd nothing is recorded, as under no_grad, and every operation takes one dispatch less.
_without_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", torch.no_grad)


_latest: list[Any] = [None, None]  # autograd's number of the pass that began last, and a reference to its attachment


class Attachment:
    """One armed backward pass. It is spent when that pass ends; :meth:`remove` disarms it earlier."""

    # What a plain pass leaves as it is; never changed in place.
    _turned: Mapping[int, list[bool]] = MappingProxyType({})  # steps whose results are transposed: which of them
    _inner: Mapping[int, tuple[Node, Tensor]] = MappingProxyType({})  # by cell, node and tensor of each that is no leaf
    _fresh: Set[int] = frozenset()  # cells of the leaves that had no gradient when backward began
    _handles: Sequence[Any] = ()
    _next = 0
    _started = False

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._lock = threading.Lock()
        # In the order of backward, an entry for each step of the plan:
        self._steps: list[Step] = []
        self._formulas: list[Formula | None] = []  # None: nothing to do, or done
        self._gradients: list[Any] = []  # what the formula takes as g, or AWAITED, or PLAIN
        # Curvature that has arrived so far, by cell, and the leaves that receive it in the end, by cell and node:
        self._cells: list[Any] = []
        self._leaves: list[tuple[int, Node]] = []
        self._left_out: dict[int, Tensor] = {}  # gradients, by cell, that composites account for already

    @property
    def active(self) -> bool:
        """Whether a backward pass will still deliver diagonals."""
        return bool(self._handles)

    def remove(self) -> None:
        """Disarms: takes every hook off the graph and lets go of all tensors. Harmless when already spent."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        self._formulas = []
        self._gradients.clear()  # in place: the hooks share it
        self._cells = []
        self._leaves = []
        self._inner = MappingProxyType({})
        self._left_out = {}

    def _begin(self, ref: weakref.ref[Attachment]) -> bool:
        """Called by the first hook of a backward pass. False: this pass does not accumulate gradients."""
        if not _will_execute(_FOREIGN):  # only some nodes run
            try:
                self._leaves = [leaf for leaf in self._leaves if _will_execute(leaf[1])]
                self._inner = {cell: sink for cell, sink in self._inner.items() if _will_execute(sink[0])}
            except RuntimeError:
                return False  # torch.autograd.grad(): stay armed for the backward() to come
        task = torch._C._current_graph_task_id()
        other = _latest[1]() if _latest[0] == task else None
        if other is not None and other is not self and other.active:
            self.remove()
            other.remove()
            raise RuntimeError(
                "two attached losses met in one backward pass, in which neither can tell its own "
                "gradient: attach their sum, or call backward() on each"
            )
        _latest[:] = task, ref
        self._fresh = {cell for cell, node in self._leaves if node.variable.grad is None}
        self._started = True
        Variable._execution_engine.queue_callback(partial(_finish, ref))
        return True

    def _sweep(self, final: bool) -> None:
        """Carries curvature down the graph until a step still waits for its gradient."""
        steps, formulas, gradients, cells, inner = (
            self._steps,
            self._formulas,
            self._gradients,
            self._cells,
            self._inner,
        )
        for k in range(self._next, len(formulas)):
            formula = formulas[k]
            if formula is None:
                continue
            g = gradients[k]
            if g is AWAITED:
                if not final:
                    self._next = k
                    return
                continue  # backward(inputs=...) never ran this node
            formulas[k] = gradients[k] = None
            cell, rule, _, _, _, _, targets, outputs, _ = steps[k]
            if outputs is None:
                h = cells[cell]
                if cell not in inner:
                    cells[cell] = None
                if g is not None and g is not PLAIN:
                    g = g[0]
                    if g is not None and g.dtype in HALF:
                        g = g.float()
                    if cell in self._left_out:
                        g = g - self._left_out.pop(cell)
            else:
                h = self._take(outputs)
                if g is not None and g is not PLAIN:
                    g = _full_precision(g)
            try:
                if g is PLAIN:
                    if h is None:
                        continue
                    results = formula(h)
                elif g is None and h is None:
                    continue
                else:
                    results = formula(g, h)
            except Exception as error:
                error.add_note(f"while carrying curvature through {rule.name}")
                raise
            if len(results) != len(targets):
                raise RuntimeError(
                    f"the rule for {rule.name} returned {len(results)} curvatures for {len(targets)} inputs; it must "
                    "return one (or None) for each entry of node.next_functions"
                )
            if k in self._turned:
                results = [r.t() if t and r is not None else r for r, t in zip(results, self._turned[k], strict=True)]
            for target, result in zip(targets, results):  # noqa: B905 (checked above, and strict costs more)
                if result is None or target == -1:
                    continue
                if target >= 0:
                    earlier = cells[target]
                    cells[target] = result if earlier is None else earlier + result
                else:
                    earlier = self._left_out.get(-2 - target)
                    self._left_out[-2 - target] = result if earlier is None else earlier + result
        self._next = len(formulas)

    def _take(self, outputs: list[int]) -> tuple[Tensor | None, ...] | None:
        """The curvatures of several outputs as a formula takes them; None where all are zero."""
        h = tuple([self._cells[cell] for cell in outputs])
        for cell in outputs:
            if cell not in self._inner:
                self._cells[cell] = None
        return None if all(part is None for part in h) else h

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
        for cell, node in self._leaves:
            tensor = node.variable
            h = cells[cell]
            # An operation may hand one tensor to several inputs.
            if (
                h is None
                or h.stride() != tensor.stride()
                or h.dtype is not tensor.dtype
                or h.shape != tensor.shape
                or h.data_ptr() in taken
                or h.dtype in HALF
            ):
                h = _laid_out_like(tensor, h)
            taken.add(h.data_ptr())
            _add(tensor, h, cell in self._fresh)
        for cell, (_, tensor) in self._inner.items():
            _add(tensor, _laid_out_like(tensor, cells[cell]), False)


def _add(tensor: Tensor, h: Tensor, anew: bool) -> None:
    earlier = None if anew else getattr(tensor, "hess_diag", None)
    tensor.hess_diag = h if earlier is None else earlier + h  # type: ignore[attr-defined]


def _laid_out_like(tensor: Tensor, h: Tensor | None) -> Tensor:
    """A copy of ``h`` (None: zeros) with the shape and strides of ``tensor``, in its dtype or float32."""
    dtype = torch.float32 if tensor.dtype in HALF else tensor.dtype
    if h is None:
        return torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
    if h.shape != tensor.shape:
        raise RuntimeError(
            f"curvature of shape {tuple(h.shape)} arrived at a tensor of shape {tuple(tensor.shape)}: "
            "a rule on the way returned the wrong shape"
        )
    return torch.empty_like(tensor, dtype=dtype, requires_grad=False).copy_(h)


def _full_precision(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """The gradients of several outputs as a formula takes them; None where nothing arrived."""
    if all(g is None for g in grads):
        return None
    return tuple([g.float() if g is not None and g.dtype in HALF else g for g in grads])


def on_gate(ref: weakref.ref[Attachment], k: int, grads: tuple[Tensor | None, ...]) -> None:
    """The hook that fires first. ``k`` is the step whose gradient it brings; -1: none."""
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
    if attachment._begin(ref) and k >= 0:
        attachment._gradients[k] = grads


def on_sweep(ref: weakref.ref[Attachment], k: int, grads: tuple[Tensor | None, ...]) -> None:
    """The hook of every few steps, which sweeps what can be swept, to free what it holds."""
    attachment = ref()
    if attachment is None or not attachment._started:
        return
    attachment._gradients[k] = grads
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
