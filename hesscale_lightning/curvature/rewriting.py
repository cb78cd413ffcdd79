"""Makes what was recorded cheaper: passes over the lines of a program that leave its results as they are.

- what no result needs is left out;
- ``(A B)^T`` becomes ``B^T A^T``, which lays a weight's curvature out like the weight;
- products of matrices that are added up, as by all uses of a recurrent weight, become one product of stacked matrices;
- a factor that two added products share is taken out, ``s s h + s u g -> s (s h + u g)``;
- a product that is added to something is added by the same operation (``addcmul``, ``add`` with ``alpha``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from hesscale_lightning.curvature.recorder import Constant, Line, Slot

#: How many products are stacked, and the most numbers that are kept for it.
_FEWEST_STACKED, _MOST_STACKED = 4, 8
_MOST_NUMBERS_STACKED = 2**22
_MOST_FACTORS = 8
_DEEPEST_TURNED = 8


class Rewriter:
    """Rewrites lines.

    Attributes:
        lines: All lines by number; new ones are added at the end.
        order: Numbers of those that are computed, in their order.
        needed: Numbers of all that is read or computed, inputs included.
    """

    def __init__(self, lines: Sequence[Line], results: Mapping[int, int]) -> None:
        self.lines = list(lines)
        self.order = [k for k in range(len(lines)) if lines[k].kind != "input"]
        self.needed: set[int] = set()
        self._reads: dict[int, tuple[Line, list[int]]] = {}
        self._place: dict[int, int] = {}  # while products are stacked: where in the order each line is computed
        self._inserted: dict[int, list[int]] = {}  # new lines, by the place behind which they are put
        self._stacks: dict[Any, int] = {}
        self._results = set(results.values())
        self._counted = Counter(results.values())

    def run(self) -> None:
        """All passes."""
        self._drop_unused()
        self._turn_products()
        self._stack_products()
        self._take_out_factors()
        self._fuse()
        self._drop_unused()

    def reads(self, k: int) -> list[int]:
        """Numbers of the slots that line ``k`` reads."""
        line = self.lines[k]
        known = self._reads.get(k)
        if known is None or known[0] is not line:
            known = self._reads[k] = line, slots_of(line)
        return known[1]

    def _uses(self) -> Counter[int]:
        uses: Counter[int] = Counter(self._counted)
        for k in self.order:
            for n in self.reads(k):
                uses[n] += 1
        return uses

    def _drop_unused(self) -> None:
        needed = set(self._results)
        for k in reversed(self.order):
            if k in needed:
                needed.update(self.reads(k))
        self.order = [k for k in self.order if k in needed]
        self.needed = needed

    def _turn_products(self) -> None:
        """``(A B)^T`` into ``B^T A^T``, which lays a weight's curvature out like the weight; in sums as well."""
        uses = self._uses()
        order: list[int] = []
        for k in self.order:
            if self.lines[k].kind == ".t":
                turned = self._turned(self.lines[k].arguments[0].number, uses, order)
                if turned is not None:
                    self.lines[k] = turned
            order.append(k)
        self.order = order
        self._drop_unused()

    def _turned(self, slot: int, uses: Counter[int], made: list[int], depth: int = 0) -> Line | None:
        """What computes the transpose of a product, or of a sum of such, in its place; None: nothing does."""
        line = self.lines[slot]
        if uses[slot] != 1 or line.shape is None or len(line.shape) != 2:
            return None
        sides: list[Slot] = []
        if line.kind == "@":
            sides += [self._transpose(x.number, made) for x in reversed(line.arguments)]
        elif line.kind == "+" and depth < _DEEPEST_TURNED:
            for x in line.arguments:
                if type(x) is not Slot or self.lines[x.number].shape != line.shape:
                    return None
                if self.lines[x.number].kind == ".t":
                    sides.append(self.lines[x.number].arguments[0])
                    continue
                turned = self._turned(x.number, uses, made, depth + 1)
                if turned is None:
                    return None
                sides.append(Slot(self._line(turned, made)))
        if not sides:
            return None
        return line._replace(arguments=tuple(sides), shape=torch.Size(line.shape[::-1]), fresh=True)

    def _transpose(self, slot: int, made: list[int]) -> Slot:
        line = self.lines[slot]
        if line.kind == ".t":
            turned: Slot = line.arguments[0]
            return turned
        assert line.shape is not None
        return Slot(self._line(Line(".t", (Slot(slot),), (), line.shape[::-1], line.dtype, False), made))

    def _stack_products(self) -> None:
        """``sum_t A_t B_t`` into products of ``[A_1 A_2 ..]`` and ``[B_1; B_2; ..]``, and sums likewise.

        A few terms at a time, and as soon as these are there, so that what they are made of is not kept for long.
        """
        uses = self._uses()
        inner: set[int] = set()  # sums that are part of a larger one
        self._place = {}
        for i, k in enumerate(self.order):
            line = self.lines[k]
            self._place[k] = i
            for n in self.reads(k):
                self._place.setdefault(n, i)  # an input is there as soon as it is read
            if line.kind == "+" and line.shape is not None:
                inner.update(a.number for a in line.arguments if type(a) is Slot and self._is_sum(a.number, uses))
        for k in [k for k in self.order if k not in inner and self._is_sum(k, None)]:
            self._stack_terms(k, uses)
        if not self._inserted:
            return
        order: list[int] = []
        for i, k in enumerate(self.order):
            order.append(k)
            order += self._inserted.get(i, ())
        self.order = order
        self._drop_unused()

    def _is_sum(self, slot: int, uses: Counter[int] | None) -> bool:
        line = self.lines[slot]
        return (
            line.kind == "+"
            and line.shape is not None
            and all(type(a) is Slot for a in line.arguments)
            and (uses is None or uses[slot] == 1)
        )

    def _terms(self, k: int, uses: Counter[int]) -> list[int]:
        """What a sum adds up."""
        terms: list[int] = []
        stack = [k]
        while stack:
            slot = stack.pop()
            if slot == k or self._is_sum(slot, uses):
                stack.extend(a.number for a in self.lines[slot].arguments)
            else:
                terms.append(slot)
        return terms

    def _stack_terms(self, k: int, uses: Counter[int]) -> None:
        """Makes the sum ``k`` shorter, if there is enough to stack."""
        groups: dict[Any, list[int]] = {}
        for term in self._terms(k, uses):
            groups.setdefault(self._kind_of_term(term, uses), []).append(term)
        kept: list[int] = []
        stacked = False
        for kind, members in groups.items():
            if kind is None or len(members) < _FEWEST_STACKED:
                kept += members
                continue
            stacked = True
            for some in _pieces(members[::-1], min(_MOST_STACKED, max(1, _MOST_NUMBERS_STACKED // sum(kind[-1])))):
                made: list[int] = []
                kept.append(
                    self._stacked_product(some, uses, made) if kind[0] == "@" else self._stacked_sum(some, made)
                )
                self._insert(made)
        if not stacked:
            return
        line = self.lines[k]
        total = kept[0]
        for term in kept[1:-1]:
            total = self._added("+", (Slot(total), Slot(term)), line)
            self._insert([total])
        if len(kept) > 1:
            self.lines[k] = line._replace(arguments=(Slot(total), Slot(kept[-1])))
        else:
            self.lines[k] = self.lines[total]

    def _insert(self, made: Sequence[int]) -> None:
        """Has new lines computed, in this order, as soon as all that they read is there."""
        place = max(self._place[n] for k in made for n in self.reads(k) if n in self._place)
        self._place.update(dict.fromkeys(made, place))
        self._inserted.setdefault(place, []).extend(made)

    def _kind_of_term(self, term: int, uses: Counter[int]) -> Any:
        """Terms of one kind can be stacked; ends with the numbers that are kept for each."""
        line = self.lines[term]
        if uses[term] != 1 or line.shape is None:
            return None
        if line.kind == "@" and len(line.shape) == 2:
            a, b = (self.lines[x.number] for x in line.arguments)
            if a.shape is None or b.shape is None or len(a.shape) != 2 or len(b.shape) != 2:
                return None
            return "@", a.shape, b.shape, line.dtype, (a.shape.numel(), b.shape.numel())
        if line.kind == ".sum" and line.arguments[1:] == ((0,),) and not line.keywords:
            x = self.lines[line.arguments[0].number]
            if x.shape is None or len(x.shape) != 2:
                return None
            return ".sum", x.shape, line.dtype, (x.shape.numel(),)
        return None

    def _stacked_product(self, members: Sequence[int], uses: Counter[int], made: list[int]) -> int:
        lefts = [self.lines[m].arguments[0].number for m in members]
        rights = [self.lines[m].arguments[1].number for m in members]
        first = self.lines[members[0]]
        if all(self.lines[x].kind == ".t" for x in lefts):
            left = self._stack([self.lines[x].arguments[0].number for x in lefts], 0, made)
            stacked = self.lines[left]
            assert stacked.shape is not None
            left = self._line(Line(".t", (Slot(left),), (), stacked.shape[::-1], stacked.dtype, False), made)
        else:
            left = self._stack(lefts, 1, made)
        squares = [self.lines[x] for x in rights]
        if all(q.kind == "*" and q.arguments[0] == q.arguments[1] for q in squares) and all(
            uses[x] == 1 for x in rights
        ):
            right = self._stack([q.arguments[0].number for q in squares], 0, made)
            stacked = self.lines[right]
            right = self._line(Line("*", (Slot(right), Slot(right)), (), stacked.shape, stacked.dtype, True), made)
        else:
            right = self._stack(rights, 0, made)
        return self._line(first._replace(arguments=(Slot(left), Slot(right))), made)

    def _stacked_sum(self, members: Sequence[int], made: list[int]) -> int:
        first = self.lines[members[0]]
        stacked = self._stack([self.lines[m].arguments[0].number for m in members], 0, made)
        return self._line(first._replace(arguments=(Slot(stacked), (0,))), made)

    def _stack(self, slots: Sequence[int], dim: int, made: list[int]) -> int:
        arguments = (Constant(torch.cat), tuple([Slot(s) for s in slots]), dim)
        known = self._stacks.get(arguments)
        if known is None:
            first = self.lines[slots[0]]
            assert first.shape is not None
            shape = list(first.shape)
            shape[dim] *= len(slots)
            known = self._line(Line("call", arguments, (), torch.Size(shape), first.dtype, True), made)
            self._stacks[arguments] = known
        return known

    def _line(self, line: Line, made: list[int]) -> int:
        self.lines.append(line)
        made.append(len(self.lines) - 1)
        return made[-1]

    def _take_out_factors(self) -> None:
        uses = self._uses()
        order: list[int] = []
        for k in self.order:
            line = self.lines[k]
            if line.kind in "+-" and all(type(a) is Slot for a in line.arguments):
                order += self._with_factor_taken_out(k, line, uses)
            order.append(k)
        self.order = order
        self._drop_unused()

    def _with_factor_taken_out(self, k: int, line: Line, uses: Counter[int]) -> list[int]:
        """Lines to be put before line ``k``, which becomes a product; none if there is no common factor."""
        left, right = (self._factors(a.number, uses) for a in line.arguments)
        common = [f for f in left if type(f) is Slot and f in right and self._is_like(f, line)]
        if not common or len(left) < 2 or len(right) < 2:
            return []
        factor = common[0]
        if any(self._dtype(f) not in (line.dtype, None) for f in left + right):
            return []
        made: list[int] = []
        sides = []
        for factors in (left, right):
            rest = list(factors)
            rest.remove(factor)
            rest.sort(key=lambda f: type(f) is not Slot)  # numbers last
            product = rest[0]
            if type(product) is not Slot:
                return []
            for other in rest[1:]:
                product = Slot(self._added("*", (product, other), line))
                made.append(product.number)
            sides.append(product)
        inner = self._added(line.kind, tuple(sides), line)
        made.append(inner)
        for a in line.arguments:
            uses[a.number] -= 1
        uses.update(n for m in made for n in self.reads(m))
        uses[factor.number] += 1
        self.lines[k] = line._replace(kind="*", arguments=(Slot(inner), factor))
        return made

    def _factors(self, slot: int, uses: Counter[int]) -> list[Any]:
        """The factors of a product that nothing else uses; no more than a few, as a product may be very long."""
        found: list[Any] = []
        stack: list[Any] = [Slot(slot)]
        while stack:
            factor = stack.pop()
            if type(factor) is Slot and len(found) + len(stack) < _MOST_FACTORS:
                line = self.lines[factor.number]
                if line.kind == "*" and uses[factor.number] == 1:
                    stack += line.arguments[::-1]
                    continue
            found.append(factor)
        return found

    def _added(self, kind: str, arguments: tuple[Any, ...], like: Line) -> int:
        shapes = [s for a in arguments if type(a) is Slot and (s := self.lines[a.number].shape) is not None]
        shape, dtype = (_broadcast(shapes), like.dtype) if shapes else (None, None)  # else: numbers
        self.lines.append(Line(kind, arguments, (), shape, dtype, True))
        return len(self.lines) - 1

    def _is_like(self, x: Slot, line: Line) -> bool:
        other = self.lines[x.number]
        return other.shape == line.shape and other.dtype is line.dtype

    def _dtype(self, x: Any) -> Any:
        return self.lines[x.number].dtype if type(x) is Slot else None

    def _fuse(self) -> None:
        """Products into the sums that alone use them, and ``(1 - c z) u`` into ``u - c z u``."""
        uses = self._uses()
        for k in self.order:
            line = self.lines[k]
            if line.shape is None:
                continue
            if line.kind == "*":
                self._fuse_complement(k, line, uses)
            elif line.kind == "+" and _is_plain_number(line.arguments[1]):
                self._turn_around(k, line, uses)
            elif line.kind in "+-" and all(type(a) is Slot for a in line.arguments):
                first, second = line.arguments
                fused = self._fused_sum(line, first, second, -1 if line.kind == "-" else 1, uses)
                if fused is None and line.kind == "+":
                    fused = self._fused_sum(line, second, first, 1, uses)
                if fused is not None:
                    self.lines[k] = fused

    def _turn_around(self, k: int, line: Line, uses: Counter[int]) -> None:
        """``-x + c`` into ``c - x``."""
        x, number = line.arguments
        made = self.lines[x.number]
        if (
            made.kind == "*"
            and uses[x.number] == 1
            and _is_plain_number(made.arguments[1])
            and made.arguments[1] == -1
            and self._is_like(made.arguments[0], line)
        ):
            self.lines[k] = line._replace(kind="-", arguments=(number, made.arguments[0]))

    def _fuse_complement(self, k: int, line: Line, uses: Counter[int]) -> None:
        for complement, other in (line.arguments, line.arguments[::-1]):
            if type(complement) is not Slot or type(other) is not Slot or complement == other:
                continue
            made = self.lines[complement.number]
            if made.kind != "-" or not _is_plain_number(made.arguments[0]) or made.arguments[0] != 1:
                continue
            z, factor = made.arguments[1], 1
            product = self.lines[z.number]
            if product.kind == "*" and uses[z.number] == 1 and _is_plain_number(product.arguments[1]):
                z, factor = product.arguments
            if uses[complement.number] <= 2 and self._is_like(other, line) and self._is_like(z, line):
                self.lines[k] = line._replace(kind="addcmul", arguments=(other, other, z, -factor))
                return

    def _fused_sum(self, line: Line, kept: Slot, product: Slot, sign: int, uses: Counter[int]) -> Line | None:
        made = self.lines[product.number]
        if made.kind != "*" or uses[product.number] != 1 or kept == product:
            return None
        if self._dtype(kept) is not line.dtype or made.dtype is not line.dtype:
            return None
        a, b = made.arguments
        if self._is_number(b):
            inner = self.lines[a.number]
            if (
                (sign == 1 or type(b) is not Slot)
                and inner.kind == "*"
                and uses[a.number] == 1
                and inner.dtype is line.dtype
            ):
                x, y = inner.arguments
                if (
                    not self._is_number(y)
                    and self._dtype(x) is self._dtype(y) is line.dtype
                    and self._is_fast(line, kept, x, y)
                ):
                    return line._replace(kind="addcmul", arguments=(kept, x, y, b if sign == 1 else -b))
            if type(b) is Slot:
                return line._replace(kind="add" if sign == 1 else "sub", arguments=(kept, a, b))
            return line._replace(kind="add", arguments=(kept, a, sign * b))
        if self._dtype(a) is self._dtype(b) is line.dtype and self._is_fast(line, kept, a, b):
            return line._replace(kind="addcmul", arguments=(kept, a, b, sign))
        return None

    def _is_fast(self, line: Line, *operands: Slot) -> bool:
        """Whether addcmul is: not where several operands are alike along the last dimension, by five times."""
        assert line.shape is not None
        width = line.shape[-1:]
        return width == (1,) or sum(self._shape(x)[-1:] != width for x in operands) < 2

    def _shape(self, x: Slot) -> torch.Size:
        shape = self.lines[x.number].shape
        assert shape is not None
        return shape

    def _is_number(self, x: Any) -> bool:
        return type(x) is not Slot or self.lines[x.number].shape is None


def _is_plain_number(x: Any) -> bool:
    return type(x) in (int, float)


def _pieces(members: Sequence[int], most: int) -> list[Sequence[int]]:
    """As few as possible, of about the same length, none longer than ``most``."""
    count = -(-len(members) // most)
    ends = [len(members) * i // count for i in range(count + 1)]
    return [members[a:b] for a, b in pairwise(ends)]


def _broadcast(shapes: Sequence[torch.Size]) -> torch.Size:
    return shapes[0] if all(s == shapes[0] for s in shapes) else torch.broadcast_shapes(*shapes)


def slots_of(line: Line) -> list[int]:
    """Numbers of the slots that a line reads."""
    found: list[int] = []
    if line.kind != "input":
        _collect(line.arguments, found)
        _collect(line.keywords, found)
    return found


def _collect(arguments: Sequence[Any], found: list[int]) -> None:
    for argument in arguments:
        if type(argument) is Slot:
            found.append(argument.number)
        elif type(argument) is tuple:
            _collect(argument, found)
