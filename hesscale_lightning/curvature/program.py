"""Straight-line programs: what the rules of a pass have computed, to be run again for other graphs of the structure.

The lines that a :class:`~.recorder.Recorder` took down are made cheaper (:mod:`.rewriting`) and written as one Python
function. A result takes the memory of an operand where nothing else, no view and no later line, reads that memory, and
a tensor is dropped after its last use. The function is a generator: it stops where it needs gradients that backward has
not delivered, so that what it holds can be freed on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hesscale_lightning.curvature.recorder import Constant, Line, Slot
from hesscale_lightning.curvature.rewriting import Rewriter

#: Gradients that may wait before what can be computed is computed, and bytes of these and of what else is let go then:
#: one long sweep is faster than many short ones, but holds what it has not passed.
_MOST_WAITING, _MOST_BYTES_WAITING, _MOST_BYTES_AT_END = 4, 2**20, 2**18


#: Operators that can write their result over an argument: which, and by which operator.
_threshold_backward = torch.ops.aten.threshold_backward
_OVER: dict[Any, tuple[int, Any]] = {Constant(_threshold_backward.default): (1, _threshold_backward.grad_input)}


class Program(NamedTuple):
    """A program and what it needs.

    Attributes:
        run: ``run(saved, grads, arrived)``, a generator; see :func:`compile_program`.
        gradients: The nodes (by position) whose gradients it takes, in the order in which it does.
        sweeps: For each of these, whether the program is to go on when it has arrived.
        own: Which results share no memory with anything else.
        source: What ``run`` was compiled from.
    """

    run: Callable[..., Any]
    gradients: list[int]
    sweeps: list[bool]
    own: frozenset[int]
    source: str


def compile_program(lines: Sequence[Line], inputs: Sequence[Any], results: Mapping[int, int]) -> Program:
    """Writes the program.

    Args:
        lines: What was recorded. The argument of an input line is its name; ``("g", position, output)`` for a gradient.
        inputs: Names of the other inputs, in the order in which they will be given.
        results: For each result by a number of the caller's, its slot.

    Returns:
        The program. ``run(saved, grads, arrived)`` takes the inputs in their order, which it clears, a list with an
        entry for each gradient, which backward fills and it clears, and a dictionary for the results; it yields the
        index up to which it needs the gradients next.
    """
    return _Writer(lines, inputs, results).program()


class _Writer:
    def __init__(self, lines: Sequence[Line], inputs: Sequence[Any], results: Mapping[int, int]) -> None:
        rewriter = Rewriter(lines, results)
        rewriter.run()
        self._lines, self._order, self._needed = rewriter.lines, rewriter.order, rewriter.needed
        self._reads = rewriter.reads
        self._inputs = inputs
        self._results = dict(results)
        self._constants: dict[str, Any] = {
            "addcmul": torch.addcmul, "add": torch.add, "sub": torch.sub, "rsub": torch.rsub, "mm": torch.mm,
            "bmm": torch.bmm,
        }  # fmt: skip
        self._names: dict[Any, str] = {}

    def program(self) -> Program:
        """The program."""
        last = self._last_reads()
        gradients, sweeps, starts = self._segments(last)
        group = self._groups()
        received = [k for k, line in enumerate(self._lines) if line.kind == "input" and k in self._needed]
        by_name = {self._lines[k].arguments[0]: k for k in received}
        body = []
        given = [f"v{by_name[name]}" if name in by_name else "_" for name in self._inputs]
        if given:
            body.append(f"[{', '.join(given)}] = saved")
            body.append("saved.clear()")
            if "_" in given:
                body.append("_ = None")
        arrived = 0
        place = {position: i for i, position in enumerate(gradients)}
        of_gradient = {
            k: (place[position], output)
            for k in received
            if self._is_gradient(k)
            for _, position, output in [self._lines[k].arguments[0]]
        }
        unread = Counter(entry for entry, _ in of_gradient.values())  # outputs of each that are still to be read
        unread.update(of_gradient[slot][0] for slot in self._results.values() if slot in of_gradient)
        first_read: dict[int, int] = {}
        for i, k in enumerate(self._order):
            for n in self._reads(k):
                first_read.setdefault(n, i)
        for i, k in enumerate(self._order):
            if i in starts:
                body.append(f"yield {starts[i]}")
                arrived = starts[i]
            line = self._lines[k]
            for n in dict.fromkeys(self._reads(k)):
                if n in of_gradient and first_read[n] == i:
                    entry, output = of_gradient[n]
                    assert entry < arrived
                    body.append(f"v{n} = grads[{entry}][{output}]")
                    unread[entry] -= 1
                    if not unread[entry]:  # the list is not to keep it
                        body.append(f"grads[{entry}] = None")
            body.append(f"v{k} = {self._expression(k, line, i, last, group)}")
            dropped = [n for n in dict.fromkeys(self._reads(k)) if last[n] == i]
            if dropped:
                body.append("del " + ", ".join(f"v{n}" for n in dropped))
        for number, slot in self._results.items():
            if slot in of_gradient:  # a gradient cannot be a curvature, but a rule may say so
                entry, output = of_gradient[slot]
                body.append(f"v{slot} = grads[{entry}][{output}]")
            body.append(f"arrived[{number}] = v{slot}")
        body.append("return\n    yield")
        source = "def run(saved, grads, arrived):\n    " + "\n    ".join(body) + "\n"
        exec(source, self._constants)  # the source is made of the kinds and constants above alone
        own = frozenset(number for number, slot in self._results.items() if self._is_own(slot, group))
        return Program(self._constants["run"], gradients, sweeps, own, source)

    def _is_gradient(self, k: int) -> bool:
        name = self._lines[k].arguments[0]
        return isinstance(name, tuple) and name[0] == "g"

    def _segments(self, last: Mapping[int, int]) -> tuple[list[int], list[bool], dict[int, int]]:
        """Which gradients are taken, after which of them the program goes on, and where it stops for how many."""
        order = {position: i for i, position in enumerate(self._gradient_order())}
        held = [0] * len(order)  # bytes of each gradient, and of the inputs that are no longer needed then
        needs: list[tuple[int, int]] = []  # line, how many gradients must have arrived
        arrived = 0
        for i, k in enumerate(self._order):
            for n in self._reads(k):
                line = self._lines[n]
                if line.kind != "input" or line.shape is None or line.dtype is None:
                    continue
                if self._is_gradient(n):
                    entry = order[line.arguments[0][1]]
                    if entry >= arrived:
                        arrived = entry + 1
                        needs.append((i, arrived))
                if last[n] == i and held:
                    held[max(0, arrived - 1)] += line.shape.numel() * line.dtype.itemsize
        sweeps = []
        waiting = size = 0
        for more in held:
            waiting, size = waiting + 1, size + more
            sweeps.append(waiting >= _MOST_WAITING and size > _MOST_BYTES_WAITING)
            if sweeps[-1]:
                waiting = size = 0
        # Late in the program the rest is computed before the last parameters get their gradients, else after that.
        if needs and 2 * needs[-1][0] >= len(self._order) and size > _MOST_BYTES_AT_END:
            sweeps[-1] = True
        starts: dict[int, int] = {}
        arrived = 0
        for i, need in needs:
            if need > arrived:
                while need < len(sweeps) and not sweeps[need - 1]:
                    need += 1
                starts[i] = arrived = need
        return list(order), sweeps, starts

    def _gradient_order(self) -> list[int]:
        """Positions of the nodes whose gradients are needed, in the order in which they were recorded."""
        return list(
            dict.fromkeys(
                self._lines[k].arguments[0][1]
                for k in sorted(self._needed)
                if self._lines[k].kind == "input" and self._is_gradient(k)
            )
        )

    def _last_reads(self) -> dict[int, int]:
        last: dict[int, int] = {}
        for i, k in enumerate(self._order):
            last.setdefault(k, i)
            for n in self._reads(k):
                last[n] = i
        for slot in self._results.values():
            last[slot] = len(self._order)
        return last

    def _groups(self) -> dict[int, set[int]]:
        """For each slot those that may share its memory, itself included."""
        group: dict[int, set[int]] = {}
        for k in sorted(self._needed):
            if self._lines[k].kind == "input":
                group[k] = {k}
        for k in self._order:
            group[k] = {k}
            line = self._lines[k]
            if (not line.fresh and line.shape is not None) or line.kind == "call":
                if line.fresh:
                    continue
                for n in self._reads(k):
                    if self._lines[n].shape is not None or self._lines[n].kind == "call":
                        joined = group[k] | group[n]
                        for m in joined:
                            group[m] = joined
        return group

    def _is_own(self, slot: int, group: Mapping[int, set[int]]) -> bool:
        results = list(self._results.values())
        return (
            not any(self._lines[m].kind == "input" for m in group[slot]) and sum(m in group[slot] for m in results) == 1
        )

    def _may_overwrite(self, x: Any, k: int, i: int, last: Mapping[int, int], group: Mapping[int, set[int]]) -> bool:
        """Whether line ``k``, the ``i``-th, may write its result over the operand ``x``."""
        if type(x) is not Slot:
            return False
        line, operand = self._lines[k], self._lines[x.number]
        return (
            operand.kind != "input"
            and operand.fresh
            and operand.shape == line.shape
            and operand.dtype is line.dtype
            and last[x.number] == i
            and all(m == x.number or (m != k and last[m] < i) for m in group[x.number])
        )

    def _expression(self, k: int, line: Line, i: int, last: Mapping[int, int], group: Mapping[int, set[int]]) -> str:
        arguments = line.arguments
        if line.shape is not None:
            if line.kind == "*":
                for x, y in (arguments, arguments[::-1]):
                    if self._may_overwrite(x, k, i, last, group):
                        return f"{self._text(x)}.mul_({self._text(y)})"
            elif line.kind in "+-" and self._may_overwrite(arguments[0], k, i, last, group):
                name = "add_" if line.kind == "+" else "sub_"
                return f"{self._text(arguments[0])}.{name}({self._text(arguments[1])})"
            elif line.kind == "+" and self._may_overwrite(arguments[1], k, i, last, group):
                return f"{self._text(arguments[1])}.add_({self._text(arguments[0])})"
            elif line.kind == "/" and self._may_overwrite(arguments[0], k, i, last, group):
                return f"{self._text(arguments[0])}.div_({self._text(arguments[1])})"
            elif line.kind == "/" and type(arguments[0]) in (int, float) and arguments[0] == 1:
                inverse = "reciprocal_" if self._may_overwrite(arguments[1], k, i, last, group) else "reciprocal"
                return f"{self._text(arguments[1])}.{inverse}()"  # 1 / x is that too, and a Python function
            elif line.kind == "-" and type(arguments[0]) in (int, float):
                return f"rsub({self._text(arguments[1])}, {self._text(arguments[0])})"
            elif line.kind == "call" and arguments[0] in _OVER:
                place, call = _OVER[arguments[0]]
                if self._may_overwrite(arguments[place], k, i, last, group):
                    texts = [self._text(a) for a in arguments[1:]]
                    return (
                        f"{self._text(Constant(call))}({', '.join(texts)}, grad_input={self._text(arguments[place])})"
                    )
            elif line.kind in ("addcmul", "add", "sub"):
                return self._fused_expression(k, line, i, last, group)
        if line.kind == "item":
            return f"{self._text(arguments[0])}[{arguments[1]}]"
        if line.kind == "bitwise_not":
            return f"~{self._text(arguments[0])}"
        if line.kind == "[]":
            return f"{self._text(arguments[0])}[{self._text(arguments[1])}]"
        if line.kind in ("T", "mT", "H", "mH"):
            return f"{self._text(arguments[0])}.{line.kind}"
        texts = [self._text(a) for a in arguments]
        if line.kind == "@":
            a, b = (self._lines[x.number].shape for x in arguments)
            if a is not None and b is not None and len(a) == len(b) in (2, 3) and a[:-2] == b[:-2]:
                return f"{'mm' if len(a) == 2 else 'bmm'}({texts[0]}, {texts[1]})"
        if line.kind == "call" or line.kind[0] == ".":
            called = texts[0] if line.kind == "call" else texts[0] + line.kind
            return f"{called}({', '.join(texts[1:] + [f'{name}={self._text(a)}' for name, a in line.keywords])})"
        texts = [f"({t})" if t[0] == "-" else t for t in texts]
        return f"{texts[0]} {line.kind} {texts[1]}"

    def _fused_expression(
        self, k: int, line: Line, i: int, last: Mapping[int, int], group: Mapping[int, set[int]]
    ) -> str:
        kept, *rest = line.arguments
        factor = rest.pop()
        name = "value" if line.kind == "addcmul" else "alpha"
        texts = [self._text(x) for x in rest]
        if type(factor) is Slot or factor != 1:
            texts.append(f"{name}={self._text(factor)}")
        if self._may_overwrite(kept, k, i, last, group):
            return f"{self._text(kept)}.{line.kind}_({', '.join(texts)})"
        return f"{line.kind}({', '.join([self._text(kept), *texts])})"

    def _text(self, argument: Any) -> str:
        if type(argument) is Slot:
            return f"v{argument.number}"
        if type(argument) is tuple:
            return f"({''.join(self._text(a) + ', ' for a in argument)})"
        if (
            argument is None
            or type(argument) in (bool, int, str)
            or (type(argument) is float and abs(argument) < float("inf"))
        ):
            return repr(argument)
        if argument is Ellipsis:
            return "..."
        value = argument.value if isinstance(argument, Constant) else argument
        key = id(value) if isinstance(argument, Constant) else (type(value), value)
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = f"c{len(self._names)}"
            self._constants[name] = value
        return name
