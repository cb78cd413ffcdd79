"""Takes down all operations of a training step as one graph: forward, backward and curvature, and the update.

The step runs once on fake tensors (:mod:`torch._subclasses.fake_tensor`), which have shapes and no numbers, so that
nothing is computed, drawn or changed. What decides by a tensor's entries therefore cannot be captured, and says so,
instead of being decided once for all steps. The engine is in the step as it is: its hooks run, and what they do is
taken down like everything else.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributions import Distribution

from hesscale_lightning.curvature import engine
from hesscale_lightning.curvature.gradient_hooks import note_registrations
from hesscale_lightning.curvature.structure import StructureCache

_lock = threading.Lock()
_structures = StructureCache()  # of programs that were written on fake tensors


class CaptureError(RuntimeError):
    """A step that cannot become one program; the message says why."""


@dataclass
class Captured:
    """A step as a graph.

    Attributes:
        graph: A function of flat tensors, the step's inputs and then the constants, that returns a list of tensors.
        inputs: Fake tensors of the inputs' shapes, constants included.
        constants: Tensors that the step uses and that are none of its inputs, such as the class weights of a loss.
    """

    graph: fx.GraphModule
    inputs: list[Tensor]
    constants: list[Tensor]


def capture(function: Callable[[list[Tensor]], list[Tensor]], inputs: Sequence[Tensor], root: nn.Module) -> Captured:
    """Runs ``function`` once on fake tensors and takes down what it does.

    Args:
        function: Maps a list of tensors to a list of tensors. Inputs that it changes in place are changed by the graph.
        inputs: Tensors with the shapes, dtypes and devices of the step's.
        root: The module whose attributes must be the same before and after.

    Raises:
        CaptureError: A module keeps a tensor or a changed attribute, or a constant requires grad.
        Exception: What the function itself raises on fake tensors.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import

    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _capturing(), _unchanged(root):
        fakes: list[Tensor] = [fake_mode.from_tensor(x.detach()) for x in inputs]
        traced = make_fx(lambda *args: function(list(args)), tracing_mode="fake", _allow_non_fake_inputs=True)(*fakes)
    traced.graph.eliminate_dead_code()
    constants = _lift_constants(traced)
    fakes += [fake_mode.from_tensor(x) for x in constants]
    graph = fx.GraphModule(traced, traced.graph)
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph.recompile()
    return Captured(graph, fakes, constants)


@contextmanager
def _capturing() -> Iterator[None]:
    """The process's state while a step is captured, and back to what it was."""
    with ExitStack() as stack:
        stack.enter_context(_lock)
        stack.enter_context(_compiling())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # backward where tracing is
        stack.enter_context(torch.random.fork_rng(devices=[]))
        validates = Distribution._validate_args
        Distribution.set_default_validate_args(False)  # it looks at entries
        note_registrations()
        structures, engine._structures = engine._structures, _structures
        try:
            yield
        finally:
            Distribution.set_default_validate_args(validates)
            engine._structures = structures
            _structures.clear()
            torch.clear_autocast_cache()  # of casts of fake weights


@contextmanager
def _compiling() -> Iterator[None]:
    """Lets ``torch.compiler.is_compiling()`` say so; torch before 2.13 has no context of its own for that."""
    earlier, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = earlier


@contextmanager
def exchanged(root: nn.Module, tensors: Mapping[Tensor, Tensor]) -> Iterator[dict[Tensor, Tensor]]:
    """Puts other tensors in the place of a module's parameters and buffers, wherever it and its children hold them.

    Args:
        root: The module.
        tensors: By parameter or buffer, what to put in its place.

    Yields:
        A dictionary that in the end has, by parameter or buffer, the tensor that is in its place then, if another.
    """
    places: list[tuple[dict[str, Any], str, Any]] = []
    ended: dict[Tensor, Tensor] = {}

    def put(holder: dict[str, Any], key: str, value: Any) -> None:
        places.append((holder, key, holder[key]))
        holder[key] = value

    for module in root.modules():
        for holder in (module._parameters, module._buffers):
            for key, x in list(holder.items()):
                if x is not None and x in tensors:
                    put(holder, key, tensors[x])
        for key, value in list(vars(module).items()):  # lists of them, as recurrent layers keep
            if isinstance(value, list):
                others = [_exchanged(x, tensors) for x in value]
                if any(a is not b for a, b in zip(others, value, strict=True)):
                    put(vars(module), key, others)
    try:
        yield ended
    finally:
        for holder, key, before in places:
            now = holder.get(key)
            if isinstance(before, Tensor) and isinstance(now, Tensor) and now is not tensors[before]:
                ended[before] = now
            holder[key] = before


def _exchanged(x: Any, tensors: Mapping[Tensor, Tensor]) -> Any:
    if isinstance(x, Tensor):
        return tensors.get(x, x)
    if isinstance(x, weakref.ref):
        alive = x()
        return weakref.ref(tensors[alive]) if isinstance(alive, Tensor) and alive in tensors else x
    return x


@contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Puts back what the step has changed in its modules, which the program would not change; and tells what it was."""
    before = [(name, module, dict(vars(module))) for name, module in root.named_modules()]
    changed = []
    try:
        yield
    finally:
        for name, module, attributes in before:
            now = vars(module)
            for key in [*attributes, *(key for key in now if key not in attributes)]:
                if key not in now or key not in attributes or not _same(attributes[key], now[key]):
                    changed.append(f"{name}.{key}".lstrip("."))
            if changed:
                now.clear()
                now.update(attributes)
    if changed:
        raise CaptureError(
            f"the step changes {', '.join(changed)}, which a program would do no more: keep tensors that change in a "
            "buffer (register_buffer), and leave counters and caches out of the step"
        )


def _same(before: Any, after: Any) -> bool:
    if after is before:
        return not _holds_fake(after)
    if type(before) is not type(after):
        return False
    if isinstance(before, (list, tuple)):  # recurrent layers make such lists of their weights anew
        return len(before) == len(after) and all(map(_same, before, after))
    if isinstance(before, weakref.ref):
        return before() is after()
    return isinstance(before, (int, float, str)) and bool(before == after)


def _holds_fake(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(isinstance(part, FakeTensor) for part in value)
    if isinstance(value, dict):
        return any(isinstance(part, FakeTensor) for part in value.values())
    return isinstance(value, FakeTensor)


def _lift_constants(traced: fx.GraphModule) -> list[Tensor]:
    """Makes inputs of the tensors that are part of the graph, so that a change of their entries reaches the program."""
    graph = traced.graph
    places: dict[str, fx.Node] = {}
    constants: list[Tensor] = []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in places:
            value = getattr(traced, node.target)
            if not isinstance(value, Tensor):
                raise CaptureError(f"the step contains a {type(value).__name__}, which cannot be part of a program")
            if value.requires_grad:
                raise CaptureError(
                    f"the step uses a tensor of shape {tuple(value.shape)} that requires grad and is no parameter of "
                    "its module: make it one, or detach it"
                )
            with graph.inserting_after(last):
                last = places[node.target] = graph.placeholder(f"constant_{len(constants)}")
            last.meta.update(node.meta)
            constants.append(value)
        node.replace_all_uses_with(places[node.target])
        graph.erase_node(node)
    return constants
