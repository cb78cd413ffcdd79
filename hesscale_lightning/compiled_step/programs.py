"""From a captured graph to something that runs: by Inductor, or operation by operation."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from hesscale_lightning._torch_names import INDUCTOR, require
from hesscale_lightning.compiled_step.capture import Captured, CaptureError

Backend = Literal["inductor", "eager"]
BACKENDS = ("inductor", "eager")

#: Takes a list of tensors, which it empties, and returns the graph's outputs.
Runner = Callable[[list[Tensor]], Sequence[Any]]


def compile_graph(captured: Captured, backend: Backend, options: dict[str, Any] | None) -> Runner:
    """Makes a captured graph run.

    Args:
        captured: The graph.
        backend: "inductor", or "eager", which runs the graph's operations one after the other.
        options: Inductor's.

    Raises:
        CaptureError: There is no C++ compiler.
        ImportError: The installed torch's Inductor lacks a name that is used here.
        Exception: What Inductor raises.
    """
    graph = captured.graph
    on_cpu = all(x.device.type == "cpu" for x in captured.inputs)
    if backend == "eager":
        return lambda args: graph(*args)
    require(INDUCTOR)
    if on_cpu and not has_compiler():
        raise CaptureError(
            "Inductor needs a C++ compiler, and found none: install g++ or clang++ (Debian: apt install g++), or name "
            "one in the environment variable CXX"
        )
    if options is None and on_cpu:  # without Python between the kernels
        options = {"cpp_wrapper": True}
    return _by_inductor(graph, captured.inputs, options)


def has_compiler() -> bool:
    """Whether there is the C++ compiler that Inductor needs for programs on the CPU."""
    from torch._inductor import config

    candidates = config.cpp.cxx if isinstance(config.cpp.cxx, (tuple, list)) else (config.cpp.cxx,)
    return any(candidate and shutil.which(candidate) for candidate in (*candidates, "g++", "clang++", "cl"))


def _by_inductor(graph: fx.GraphModule, inputs: list[Tensor], options: dict[str, Any] | None) -> Runner:
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    inner: list[tuple[Any, int, int]] = []  # what Inductor made, and its numbers of inputs and outputs

    def compile_inner(functional: fx.GraphModule, examples: Any, **kwargs: Any) -> Any:
        compiled = compile_fx_inner(functional, examples, **kwargs)
        inner.append((compiled, len(examples), len(_outputs(functional))))
        return compiled

    expected = (len(inputs), len(_outputs(graph)))
    # It compiles for the modes that are on, and what is captured contains all casts.
    with torch._C._DisableAutocast(), torch.no_grad():
        whole: Any = compile_fx(graph, inputs, inner_compile=compile_inner, config_patches=options)
    if len(inner) == 1 and inner[0][1:] == expected:
        # Nothing is left to do around it: neither inputs to be updated afterwards nor outputs that are views.
        run: Runner = getattr(inner[0][0], "current_callable", None) or inner[0][0]
        return run
    return lambda args: whole(*args)


def _outputs(graph: fx.GraphModule) -> Sequence[Any]:
    (result,) = next(node for node in reversed(graph.graph.nodes) if node.op == "output").args
    return result if isinstance(result, (tuple, list)) else (result,)


class Progress:
    """Tells on standard error what takes so long.

    Args:
        what: The step, in words.
        silent: Say nothing.
    """

    def __init__(self, what: str, silent: bool) -> None:
        self._silent = silent
        self._start = time.perf_counter()
        self.say(f"capturing {what}")

    def say(self, text: str) -> None:
        """Writes a line."""
        if not self._silent:
            sys.stderr.write(f"compile_step: {text}\n")
            sys.stderr.flush()

    def captured(self, operations: int, backend: str) -> None:
        """The graph is there, and is compiled next."""
        if backend == "inductor":
            self.say(f"compiling {operations} operations with Inductor: 5 to 60 s, 3 to 20 s where its cache has them")

    def ready(self) -> None:
        """The program is there."""
        self.say(f"ready after {time.perf_counter() - self._start:.1f} s")
