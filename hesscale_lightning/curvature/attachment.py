"""An armed backward pass: when it begins and ends, and the writing of the diagonals.

Who owns what (a cycle through C++ would never be collected, and would keep every activation of every step):

    loss tensor -> Attachment -> operations, tensors, nodes -> hooks ...> weak reference to the Attachment

so that dropping the loss drops it all, also if backward raised or never ran.

What happens in between is one of two things: :mod:`.interpreted` runs the rules of a graph as backward meets its
operations, :mod:`.compiled` runs a program.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from hesscale_lightning.curvature.capturing import address_of
from hesscale_lightning.curvature.gradient_hooks import Watch, ours, suspected
from hesscale_lightning.curvature.graph import Node
from hesscale_lightning.curvature.held_groups import Held
from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.tensor_parallel import is_distributed, laid_out_like

will_execute = torch._C._will_engine_execute_node


_current_group, _set_group = torch._C._get_graph_exec_group, torch._C._set_graph_exec_group
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
_latest: list[Any] = [None, None]  # autograd's number of the pass that began last, and a reference to its attachment


class Attachment:
    """One armed backward pass. It is spent when that pass ends; :meth:`remove` disarms it earlier."""

    _handles: Sequence[Any] = ()
    _started = False
    _spent = False
    _leaves: Sequence[tuple[int, Node]] = ()  # by cell, those that receive a diagonal in the end
    _inner: Mapping[int, tuple[Node, Tensor]] = {}  # by cell, node and tensor of each that is no leaf
    _watch: Watch | None = None  # whether a hook changes a gradient, where that may be
    _fresh: Set[int] = frozenset()  # cells of the leaves that had no gradient when backward began
    held: Held | None = None  # sharded parameters, where there are some
    split = False  # whether some of the parameters are DTensors, by tensor parallelism

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._lock = threading.Lock()

    @property
    def active(self) -> bool:
        """Whether a backward pass will still deliver diagonals."""
        return bool(self._handles)

    def remove(self) -> None:
        """Disarms: takes every hook off the graph and lets go of all tensors. Harmless when already spent."""
        for handle in self._handles:
            handle.remove()
        self._spend()

    def _spend(self) -> None:
        self._spent = True
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        self._handles = ()
        self._leaves = ()
        self._inner = {}
        if self.held is not None:
            self.held.release()
            self.held = None
        self._let_go()

    def arm(self) -> None:
        """Puts the hooks on the graph."""
        raise NotImplementedError

    def watched(self, loss: Tensor, nodes: Sequence[Node]) -> None:
        """Puts the hooks on the graph, and where others may be, hooks that tell whether these change a gradient."""
        watch = None
        if suspected(nodes):
            if torch.compiler.is_compiling():  # there are no gradients to compare
                raise RuntimeError(
                    "the step puts a hook on a tensor or module (register_hook, register_full_backward_hook), of which "
                    "cannot be told whether it changes a gradient"
                )
            watch = Watch(loss)
        self.arm()
        self._watch = watch
        ours(len(self._handles) + (0 if watch is None else watch.registered))

    # -- what a kind of pass does

    def _let_go(self) -> None:
        """Drops all tensors."""

    def _only_some(self, grads: tuple[Tensor | None, ...]) -> None:
        """Told at the beginning that not all nodes will run, with the gradients at the first one."""

    def _complete(self) -> None:
        """Computes what is left, and calls :meth:`_write` for what arrived."""

    # -- the beginning and the end

    def _begin(self, ref: weakref.ref[Attachment], grads: tuple[Tensor | None, ...]) -> None:
        """Called by the first hook of a backward pass."""
        try:
            leaves = [leaf for leaf in self._leaves if will_execute(leaf[1])]
            if self._inner:
                self._inner = {cell: sink for cell, sink in self._inner.items() if will_execute(sink[0])}
        except RuntimeError:
            return  # torch.autograd.grad(): stay armed for the backward() to come
        if len(leaves) < len(self._leaves):
            self._leaves = leaves
            self._only_some(grads)
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
        if self.held is None:
            self._fresh = {cell for cell, node in leaves if node.variable.grad is None}
        else:
            self.held.begin()
            self._fresh = {cell for cell, node in leaves if self.held.fresh(node.variable)}
        self._started = True
        Variable._execution_engine.queue_callback(partial(_finish, ref))

    #: What keeps autograd out; where a checkpointed block may be run again, it must be possible to let it in.
    _without_autograd: Any = torch.no_grad

    def _guarded(self, work: Any, *args: Any) -> None:
        """Runs ``work`` without autograd and autocast; whatever it raises ends the pass."""
        try:
            if torch.is_autocast_enabled(self._device_type):
                with torch.autocast(self._device_type, enabled=False), self._without_autograd():
                    work(*args)
            else:
                with self._without_autograd():
                    work(*args)
        except StopIteration as error:  # Lightning would take it for the end of the data
            self.remove()
            raise RuntimeError("a curvature rule raised StopIteration") from error
        except BaseException:
            self.remove()
            raise

    def _write(self, arrived: Mapping[int, Tensor] | Sequence[Any], own: Set[int] = frozenset()) -> None:
        """Adds what arrived at each wanted tensor to its ``hess_diag``: memory of its own, laid out like the tensor.

        Args:
            arrived: By cell.
            own: Cells of what is known to share no memory with anything else.
        """
        if self._watch is not None and self._watch.changed:
            raise RuntimeError(
                f"a hook changed the gradient before {', '.join(dict.fromkeys(self._watch.changed))}, and curvature "
                "knows nothing of that: write the change as a torch.autograd.Function with a rule (register_rule), or "
                "remove the hook"
            )
        fresh = self._fresh
        taken: set[int] = set()
        for cell, node in self._leaves:
            tensor = node.variable
            h = arrived[cell]
            if self.held is not None and self.held.takes(tensor, h, cell in fresh):
                continue
            if self.split and is_distributed(tensor):
                h = laid_out_like(tensor, h)
            elif (
                h is None
                or h.stride() != tensor.stride()
                or (dtype := h.dtype) is not tensor.dtype
                or dtype in HALF
                or h.shape != tensor.shape
                or (cell not in own and address_of(h) in taken)
            ):
                h = _laid_out_like(tensor, h)
            elif cell not in own:  # an operation may hand one tensor to several inputs
                taken.add(address_of(h))
            if cell in fresh:
                tensor.hess_diag = h
            else:
                _add(tensor, h)
        if self.held is not None:
            self.held.scatter()
        for cell, (_, tensor) in self._inner.items():
            _add(tensor, _laid_out_like(tensor, arrived[cell]))


def _add(tensor: Tensor, h: Tensor) -> None:
    earlier = getattr(tensor, "hess_diag", None)
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


def together(group: Any, work: Callable[..., Any], *args: Any) -> Any:
    """Runs ``work`` so that a checkpointed block recomputes itself once for all that is asked of it in one group."""
    if _current_group() is not None:
        return work(*args)
    _set_group(group)
    try:
        return work(*args)
    finally:
        _set_group(None)


def on_gate(ref: weakref.ref[Any], grads: tuple[Tensor | None, ...]) -> None:
    """The hook that fires first."""
    attachment = ref()
    if attachment is None:
        raise RuntimeError(
            "the tensor given to attach() no longer exists, and its curvature went with it; attach the tensor on which "
            "backward() is called, or keep the attached one alive until then"
        )
    if attachment._spent:
        return  # torch will say that the graph was freed
    if attachment._started:
        attachment.remove()
        raise RuntimeError(
            "an earlier backward pass over this graph did not finish, so its curvature is incomplete; call attach() "
            "again before this backward()"
        )
    attachment._begin(ref, grads)


def _finish(ref: weakref.ref[Attachment]) -> None:
    attachment = ref()
    if attachment is None or not attachment._started:
        return
    try:
        attachment._guarded(attachment._complete)
    except BaseException:
        attachment.remove()
        raise
    if _keeps_graph():
        attachment.remove()
    else:  # the nodes have run for the last time, and their hooks go with them
        attachment._spend()
