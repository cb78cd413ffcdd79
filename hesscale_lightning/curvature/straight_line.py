"""Straight-line programs: the algebra of a composite, written down once and run at every step.

Which products and sums a composite needs depends on its structure alone: on which derivatives are there, which are
numbers, and which are ones. Working that out takes longer than computing on the small tensors of a head, so it is
done once, on :class:`Symbol` in place of tensors. What was asked of the symbols becomes a Python function without
branches: equal expressions are computed once, what no result needs is left out, a product that is added to something
is added by the same operation, and every tensor is dropped after its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Step(NamedTuple):
    """``kind`` applied to earlier slots (int) or to constants (as source: as a number, 2.0 would equal slot 2)."""

    kind: str
    arguments: tuple[Any, ...]


class Symbol:
    """A tensor, or a number that may differ from step to step, in a program that is being written down.

    Attributes:
        last: Size of the last dimension; 1 for a number.
        number: Whether it is a number.
    """

    __slots__ = ("last", "number", "program", "slot")

    def __init__(self, program: Program, slot: int, last: int, number: bool) -> None:
        self.program = program
        self.slot = slot
        self.last = last
        self.number = number

    def __mul__(self, other: Factor) -> Symbol:
        return self.program.combine("*", self, other)

    def __add__(self, other: Factor) -> Symbol:
        return self.program.combine("+", self, other)

    __rmul__ = __mul__
    __radd__ = __add__

    def row_sum(self) -> Symbol:
        """The sum over the last dimension, which stays with size one."""
        return self.program.record(_Step("row_sum", (self.slot,)), 1, False)

    def pick(self, index: Symbol, width: int) -> Symbol:
        """The entries ``index`` of every row."""
        return self.program.record(_Step("pick", (self.slot, index.slot, str(width))), 1, False)


#: What the algebra of derivatives works on.
Factor = Symbol | float


def is_number(x: Factor) -> bool:
    """Whether ``x`` is a number and not a tensor."""
    return x.number if isinstance(x, Symbol) else True


class Program:
    """Writes down what is asked of its symbols."""

    def __init__(self) -> None:
        self._steps: list[_Step | None] = []  # None: an input
        self._symbols: list[Symbol] = []
        self._known: dict[_Step, Symbol] = {}

    def input(self, last: int, number: bool) -> Symbol:
        """A tensor or number that the program receives."""
        self._steps.append(None)
        self._symbols.append(Symbol(self, len(self._steps) - 1, last, number))
        return self._symbols[-1]

    def record(self, step: _Step, last: int, number: bool) -> Symbol:
        """The result of a step, which is recorded only the first time that it is asked for."""
        known = self._known.get(step)
        if known is None:
            known = self._known[step] = self.input(last, number)
            self._steps[-1] = step
        return known

    def combine(self, kind: str, a: Symbol, b: Factor) -> Symbol:
        """Sum or product; the order of the operands makes no difference."""
        if not isinstance(b, Symbol):
            return self.record(_Step(kind, (a.slot, repr(float(b)))), a.last, a.number)
        if a.slot > b.slot:
            a, b = b, a
        return self.record(_Step(kind, (a.slot, b.slot)), max(a.last, b.last), a.number and b.number)

    def compiled(self, inputs: int, results: Sequence[Factor | None], fuse: bool) -> Callable[..., list[Any]]:
        """The function from the first ``inputs`` symbols to the results.

        Args:
            inputs: How many of the symbols it receives, in their order.
            results: What it returns, as a list; numbers and None as they are.
            fuse: Whether products may be added in one operation, for which all tensors must be of one dtype.
        """
        uses = self._uses([r.slot for r in results if isinstance(r, Symbol)])
        lines = self._lines(uses, fuse)
        returned = ", ".join(f"v{r.slot}" if isinstance(r, Symbol) else repr(r) for r in results)
        kept = {r.slot for r in results if isinstance(r, Symbol)}
        body = [*_with_drops(lines, kept), f"return [{returned}]"]
        source = f"def run({', '.join(f'v{k}' for k in range(inputs))}):\n    " + "\n    ".join(body)
        namespace: dict[str, Any] = {"addcmul": torch.addcmul, "add": torch.add, "pick": _pick}
        exec(source, namespace)  # the source is made of the names and numbers above alone
        run: Callable[..., list[Any]] = namespace["run"]
        return run

    def _uses(self, wanted: list[int]) -> list[int]:
        """How often each slot is used by what the results need; 0 for what they do not."""
        uses = [0] * len(self._steps)
        for slot in wanted:
            uses[slot] += 1
        for slot in range(len(self._steps) - 1, -1, -1):
            step = self._steps[slot]
            if step is not None and uses[slot]:
                for argument in _slots(step):
                    uses[argument] += 1
        return uses

    def _lines(self, uses: list[int], fuse: bool) -> list[tuple[int, str, list[int]]]:
        """For each operation: the slot it fills, its source, and the slots it reads."""
        lines: list[tuple[int, str, list[int]]] = []
        absorbed: set[int] = set()
        if fuse:
            absorbed = {product for slot in range(len(uses)) if uses[slot] for product in self._absorbed(slot, uses)}
        for slot, step in enumerate(self._steps):
            if step is None or not uses[slot] or slot in absorbed:
                continue
            product = self._absorbed(slot, uses) if fuse else []
            if product:
                lines.append(self._fused(slot, step, product[0]))
            else:
                lines.append((slot, _source(step), _slots(step)))
        return lines

    def _absorbed(self, slot: int, uses: list[int]) -> list[int]:
        """The product that the sum at ``slot`` computes on its way, if it does; as a list of one."""
        step = self._steps[slot]
        if step is None or step.kind != "+" or self._symbols[slot].number or isinstance(step.arguments[1], str):
            return []
        for product, other in (step.arguments, step.arguments[::-1]):
            made = self._steps[product]
            if (
                made is not None
                and made.kind == "*"
                and uses[product] == 1
                and product != other
                and not self._symbols[product].number
                and not self._symbols[other].number
            ):
                return [product]
        return []

    def _fused(self, slot: int, step: _Step, product: int) -> tuple[int, str, list[int]]:
        other = next(argument for argument in step.arguments if argument != product)
        made = self._steps[product]
        assert made is not None
        a, b = made.arguments
        if isinstance(b, str):
            return slot, f"add(v{other}, v{a}, alpha={b})", [other, a]
        if self._symbols[a].number or self._symbols[b].number:
            number, tensor = (a, b) if self._symbols[a].number else (b, a)
            return slot, f"add(v{other}, v{tensor}, alpha=v{number})", [other, a, b]
        return slot, f"addcmul(v{other}, v{a}, v{b})", [other, a, b]


def _slots(step: _Step) -> list[int]:
    return [argument for argument in step.arguments if isinstance(argument, int)]


def _source(step: _Step) -> str:
    if step.kind == "row_sum":
        return f"v{step.arguments[0]}.sum(-1, keepdim=True)"
    if step.kind == "pick":
        return "pick(v{}, v{}, {})".format(*step.arguments)
    a, b = (x if isinstance(x, str) else f"v{x}" for x in step.arguments)
    return f"{a} {step.kind} {b}"


def _with_drops(lines: list[tuple[int, str, list[int]]], kept: set[int]) -> list[str]:
    """The lines, each with the deletion of what is not read again."""
    last_read: dict[int, int] = {}
    for k, (_, _, read) in enumerate(lines):
        last_read.update(dict.fromkeys(read, k))
    body = []
    for k, (slot, source, read) in enumerate(lines):
        body.append(f"v{slot} = {source}")
        dropped = sorted({r for r in read if last_read[r] == k and r not in kept})
        if dropped:
            body.append("del " + ", ".join(f"v{r}" for r in dropped))
    return body


def _pick(x: Tensor, index: Tensor, width: int) -> Tensor:
    return x.expand(*index.shape[:-1], width).gather(-1, index)
