"""Random small computations for hypothesis: a list of steps, made while looking at the numbers, that can be run again.

Steps are drawn so that the numbers stay moderate and away from kinks and ties, where derivatives are a convention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

LARGEST = 12  # entries of a tensor

Function = Callable[..., Any]


@functools.cache
def _below(n: int) -> st.SearchStrategy[int]:
    return st.integers(0, n - 1)


@dataclass
class Step:
    """One operation: which of the tensors so far it takes; what it returns is appended to them."""

    text: str
    function: Function
    takes: list[int]


@dataclass
class Graph:
    """A random computation of a scalar from leaves.

    Attributes:
        leaves: Values of the leaves.
        steps: The operations.
        loss: Takes all tensors to the loss.
        wanted: Leaves that receive a diagonal, by number.
        inner: Other tensors that do, by number.
    """

    leaves: list[Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    ends: list[Step] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    inner: list[int] = field(default_factory=list)
    late: list[tuple[int, Tensor]] = field(default_factory=list)

    def run(self, leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss, and all tensors; ``leaves`` in the order of ``self.leaves``."""
        tensors: list[Tensor] = list(leaves)
        for step in self.steps:
            result = step.function(*[tensors[i] for i in step.takes])
            tensors += [result] if isinstance(result, Tensor) else result
        parts = [end.function(*[tensors[i] for i in end.takes]) for end in self.ends]
        loss = parts[0]
        for part in parts[1:]:
            loss = loss + part
        return loss, tensors

    def new_leaves(self) -> list[Tensor]:
        return [leaf.clone().requires_grad_() for leaf in self.leaves]

    def __repr__(self) -> str:
        n = len(self.leaves)
        lines = [f"leaves {[tuple(leaf.shape) for leaf in self.leaves]}, wanted {self.wanted}, inner {self.inner}"]
        lines += [f"  {step.text}{tuple(step.takes)}" for step in self.steps]
        lines += [f"  loss += {end.text}{tuple(end.takes)}" for end in self.ends]
        return f"<{n} " + "\n".join(lines) + ">"


# -- what the operations need of their inputs --------------------------------------------------------------------------


def anything(x: Tensor) -> bool:
    return True


def small(x: Tensor) -> bool:
    return bool((x.abs() < 2).all())


def positive(x: Tensor) -> bool:
    return bool((x > 0.2).all())


def off(*kinks: float) -> Callable[[Tensor], bool]:
    return lambda x: all(bool(((x - kink).abs() > 1e-3).all()) for kink in kinks)


def within(bound: float) -> Callable[[Tensor], bool]:
    return lambda x: bool((x.abs() < bound).all())


def distinct(x: Tensor) -> bool:
    values = x.reshape(-1).sort().values
    return len(values) < 2 or bool((values.diff() > 1e-3).all())


UNARY: list[tuple[str, Function, Callable[[Tensor], bool]]] = [
    ("tanh", torch.tanh, anything),
    ("sigmoid", torch.sigmoid, anything),
    ("exp", torch.exp, small),
    ("log", torch.log, positive),
    ("sqrt", torch.sqrt, positive),
    ("rsqrt", torch.rsqrt, positive),
    ("reciprocal", torch.reciprocal, lambda x: bool((x.abs() > 0.3).all())),
    ("sin", torch.sin, anything),
    ("cos", torch.cos, anything),
    ("relu", torch.relu, off(0)),
    ("leaky_relu", F.leaky_relu, off(0)),
    ("elu", F.elu, off(0)),
    ("gelu", F.gelu, anything),
    ("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), anything),
    ("silu", F.silu, anything),
    ("mish", F.mish, anything),
    ("softplus", F.softplus, anything),
    ("logsigmoid", F.logsigmoid, anything),
    ("hardtanh", F.hardtanh, off(-1, 1)),
    ("hardswish", F.hardswish, off(-3, 3)),
    ("softsign", F.softsign, off(0)),
    ("tanhshrink", F.tanhshrink, anything),
    ("abs", torch.abs, off(0)),
    ("neg", torch.neg, anything),
    ("square", torch.square, anything),
    ("cube", lambda x: x**3, small),
    ("pow", lambda x: x**1.7, positive),
    ("2 ** x", lambda x: 2**x, small),
    ("erf", torch.erf, anything),
    ("expm1", torch.expm1, small),
    ("log1p", torch.log1p, positive),
    ("atan", torch.atan, anything),
    ("sinh", torch.sinh, small),
    ("asin", torch.asin, within(0.9)),
    ("clamp", lambda x: x.clamp(-0.7, 0.8), off(-0.7, 0.8)),
    ("half", lambda x: 0.5 * x, anything),
    ("1 - x", lambda x: 1 - x, anything),
    ("x + 1", lambda x: x + 1, anything),
    ("x / 3", lambda x: x / 3, anything),
    ("3 / x", lambda x: 3 / x, lambda x: bool((x.abs() > 0.5).all())),
    ("positive", lambda x: F.softplus(x) + 0.3, anything),
]

Pair = Callable[[Tensor, Tensor], bool]
BINARY: list[tuple[str, Function, Pair]] = [
    ("mul", torch.mul, lambda a, b: True),
    ("mul", torch.mul, lambda a, b: True),
    ("add", torch.add, lambda a, b: True),
    ("sub", torch.sub, lambda a, b: True),
    ("add alpha", lambda a, b: torch.add(a, b, alpha=-0.5), lambda a, b: True),
    ("rsub", torch.rsub, lambda a, b: True),
    ("div", torch.div, lambda a, b: bool((b.abs() > 0.3).all())),
    ("pow", torch.pow, lambda a, b: positive(a) and small(b)),
    ("maximum", torch.maximum, lambda a, b: off(0)(a - b)),
    ("minimum", torch.minimum, lambda a, b: off(0)(a - b)),
    ("atan2", torch.atan2, lambda a, b: bool(((a * a + b * b) > 0.1).all())),
    ("hypot", torch.hypot, lambda a, b: bool(((a * a + b * b) > 0.1).all())),
    ("logaddexp", torch.logaddexp, lambda a, b: True),
    ("xlogy", torch.xlogy, lambda a, b: positive(b)),
    ("lerp", lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: True),
    ("where", lambda a, b: torch.where(torch.arange(a.numel()).view(a.shape) % 2 == 0, a, b), lambda a, b: True),
    ("addcmul", lambda a, b: torch.addcmul(a, a, b, value=0.5), lambda a, b: True),
    ("silu gate", lambda a, b: a * torch.sigmoid(b), lambda a, b: True),
]


class Builder:
    """Draws one graph; ``family`` weights what kind of operations it has."""

    def __init__(self, draw: Callable[[st.SearchStrategy[int]], int], family: str) -> None:
        self._draw = draw
        self._kinds = FAMILIES[family]
        self.graph = Graph()
        self.tensors: list[Tensor] = []
        self._group: list[int] = []  # tensors that share memory
        self._frozen: set[int] = set()  # groups that autograd needs as they are
        self._generator = torch.Generator().manual_seed(self.number(1000))

    def number(self, n: int) -> int:
        return self._draw(_below(n)) if n > 1 else 0

    def one_of(self, options: Sequence[Any]) -> Any:
        return options[self.number(len(options))]

    def pick(self, fits: Callable[[Tensor], bool] = anything) -> int | None:
        """One of the tensors that fit, the latest first: hypothesis shrinks towards the latest."""
        options = [i for i in reversed(range(len(self.tensors))) if fits(self.tensors[i])]
        return self.one_of(options[:6] + options[-2:]) if options else None

    # -- steps

    def leaf(self, shape: Sequence[int]) -> int:
        """A leaf, as number of a tensor. Leaves come before all else, so numbers are mended at the end."""
        value = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        if self.number(8) == 1 and value.dim() == 2:
            value = torch.randn(shape[::-1], generator=self._generator, dtype=torch.float64).t()
        self.graph.late.append((len(self.tensors), value))
        self.tensors.append(value.clone(memory_format=torch.preserve_format).requires_grad_())
        self._group.append(len(self.tensors) - 1)
        self._frozen.add(len(self.tensors) - 1)
        return len(self.tensors) - 1

    def add(self, text: str, function: Function, takes: list[int], saves: bool = True, fresh: bool = False) -> bool:
        """Appends a step, unless its numbers would be extreme.

        Args:
            text: Printed for it.
            function: Takes the tensors.
            takes: Their numbers.
            saves: Whether autograd keeps any of them, so that they may not be changed any more.
            fresh: Whether the result is new memory that autograd does not keep.
        """
        if any(self.tensors[i].numel() == 0 for i in takes):
            return False
        result = function(*[self.tensors[i] for i in takes])
        results = [result] if isinstance(result, Tensor) else list(result)
        if any(r.numel() > LARGEST or not bool((r.abs() < 6).all()) for r in results):
            return False
        self.graph.steps.append(Step(text, function, takes))
        if saves:
            self._frozen.update(self._group[i] for i in takes)
        for r in results:
            self.tensors.append(r)
            alias = None if fresh or saves else self._group[takes[0]]
            self._group.append(len(self.tensors) - 1 if alias is None else alias)
            if saves and not fresh:
                self._frozen.add(len(self.tensors) - 1)
        return True

    def unary(self) -> None:
        text, function, fits = self.one_of(UNARY)
        i = self.pick()
        assert i is not None
        if not (fits(self.tensors[i].detach()) and self.add(text, function, [i])):
            self.add("tanh", torch.tanh, [i])

    def binary(self) -> None:
        text, function, fits = self.one_of(BINARY)
        i = self.pick()
        assert i is not None
        a = self.tensors[i]

        def matches(b: Tensor) -> bool:
            try:
                return torch.broadcast_shapes(a.shape, b.shape).numel() <= LARGEST
            except RuntimeError:
                return False

        j = self.pick(matches)
        if j is None:  # as large as a tensor gets
            return
        if self.number(3) == 1:
            i, j = j, i
        a, b = self.tensors[i].detach(), self.tensors[j].detach()
        if text == "where" and a.shape != torch.broadcast_shapes(a.shape, b.shape):
            return
        if fits(a, b):
            self.add(text, function, [i, j], fresh=text in ("add", "sub", "rsub", "add alpha"))

    def product(self) -> None:
        i = self.pick(lambda x: x.dim() >= 1 and x.shape[-1] > 0)
        if i is None:
            return
        a = self.tensors[i]
        width = a.shape[-1]
        form = self.number(6)
        if form <= 1:  # a linear layer, perhaps with a weight that is in use already
            j = self.pick(lambda w: w.dim() == 2 and w.shape[1] == width) if self.number(2) else None
            j = self.leaf((self.number(3) + 1, width)) if j is None else j
            if form == 0:
                self.add("linear", F.linear, [i, j], fresh=True)
            else:
                k = self.leaf((self.tensors[j].shape[0],))
                self.add("linear bias", F.linear, [i, j, k], fresh=True)
        elif form == 2:
            j = self.pick(lambda w: w.dim() == 2 and w.shape[0] == width)
            j = self.leaf((width, self.number(3) + 1)) if j is None else j
            self.add("matmul", torch.matmul, [i, j], fresh=True)
        elif form == 3 and a.dim() == 2:
            self.add("x x^T", lambda x: x @ x.t(), [i], fresh=True)
        elif form == 4 and a.dim() == 2:
            j = self.pick(lambda w: w.dim() == 2 and w.shape[1] == width)
            if j is not None:
                self.add("a b^T", lambda x, y: x @ y.t(), [i, j], fresh=True)
        elif form == 5 and a.dim() <= 2:
            j = self.pick(lambda w: w.dim() == 1 and w.shape[0] == width)
            j = self.leaf((width,)) if j is None else j
            self.add("mv or dot", torch.matmul, [i, j], fresh=True)

    def convolution(self) -> None:
        i = self.pick(lambda x: x.dim() == 3 and x.shape[2] >= 2)
        if i is None:
            i = self.pick(lambda x: x.dim() == 2 and x.shape[1] >= 2)
            if i is None:
                i = self.leaf((1, 2, 3))
            elif self.add("unsqueeze", lambda x: x.unsqueeze(0), [i], saves=False):
                i = len(self.tensors) - 1
        channels = self.tensors[i].shape[1]
        shape = (self.number(2) + 1, channels, 2)
        j = self.pick(lambda w: w.shape == shape) if self.number(2) else None
        j = self.leaf(shape) if j is None else j
        padding = self.number(2)
        self.add(f"conv1d padding {padding}", lambda x, w: F.conv1d(x, w, padding=padding), [i, j], fresh=True)

    def reduction(self) -> None:
        i = self.pick(lambda x: x.dim() >= 1)
        if i is None:
            return
        dim, keep = self.number(self.tensors[i].dim()), bool(self.number(2))
        form = self.number(5)
        if form == 0:
            self.add(f"sum {dim}", lambda x: x.sum(dim, keepdim=keep), [i], fresh=True)
        elif form == 1:
            self.add(f"mean {dim}", lambda x: x.mean(dim, keepdim=keep), [i], fresh=True)
        elif form == 2:
            self.add(f"logsumexp {dim}", lambda x: x.logsumexp(dim, keepdim=keep), [i])
        elif form == 3 and distinct(self.tensors[i].detach()):
            self.add(f"amax {dim}", lambda x: x.amax(dim, keepdim=keep), [i])
        elif form == 4 and distinct(self.tensors[i].detach()):
            self.add(f"max {dim}", lambda x: x.max(dim, keepdim=keep).values, [i])

    def normalisation(self) -> None:
        form = self.number(4)
        i = self.pick(lambda x: x.dim() >= 1 and x.shape[-1] >= 2)
        if i is None:
            return
        width = self.tensors[i].shape[-1]
        if form == 0:
            self.add("softmax", lambda x: x.softmax(-1), [i])
        elif form == 1:
            self.add("log_softmax", lambda x: x.log_softmax(-1), [i])
        elif width >= 3 and bool((self.tensors[i].detach().std(-1) > 0.3).all()):  # of two entries only signs are left
            if form == 2:
                self.add("layer_norm", lambda x: F.layer_norm(x, (width,)), [i])
            else:
                weight, bias = self.leaf((width,)), self.leaf((width,))
                self.add("layer_norm affine", lambda x, w, b: F.layer_norm(x, (width,), w, b), [i, weight, bias])

    def view(self) -> None:
        i = self.pick(lambda x: x.dim() >= 1)
        if i is None:
            return
        x = self.tensors[i]
        dim = self.number(x.dim())
        size = x.shape[dim]
        form = self.number(10)
        if form == 0 and x.dim() == 2:
            self.add("t", lambda x: x.t(), [i], saves=False)
        elif form == 1 and x.dim() >= 2:
            self.add(f"transpose 0 {dim}", lambda x: x.transpose(0, dim), [i], saves=False)
        elif form == 2:
            self.add("flatten", lambda x: x.reshape(-1), [i], saves=False)
        elif form == 3 and size > 1:
            at = self.number(size - 1)
            self.add(f"slice {dim} {at}", lambda x: x.narrow(dim, at, size - at), [i], saves=False)
        elif form == 4:
            at = self.number(size)
            self.add(f"select {dim} {at}", lambda x: x.select(dim, at), [i], saves=False)
        elif form == 5:
            self.add("expand", lambda x: x.expand(2, *x.shape), [i])
        elif form == 6:
            self.add("view_as", lambda x: x.view_as(x), [i], saves=False)
        elif form == 7 and x.dim() == 2:
            self.add("permute", lambda x: x.permute(1, 0), [i], saves=False)
        elif form == 8:
            self.add("unsqueeze", lambda x: x.unsqueeze(dim), [i], saves=False)
        else:
            self.add("flip", lambda x: x.flip(dim), [i], fresh=True)

    def several(self) -> None:
        """An operation with several outputs."""
        i = self.pick(lambda x: x.dim() >= 1 and x.shape[0] >= 2)
        if i is None:
            return
        dim = self.number(self.tensors[i].dim())
        form = self.number(4)
        if form == 0:
            self.add(f"unbind {dim}", lambda x: x.unbind(dim), [i])
        elif form == 1:
            self.add(f"chunk {dim}", lambda x: x.chunk(2, dim), [i])
        elif form == 2:
            self.add(f"split {dim}", lambda x: x.split(1, dim), [i])
        else:
            sizes = [1, self.tensors[i].shape[dim] - 1]
            self.add(f"split sizes {dim}", lambda x: x.split(sizes, dim), [i])

    def join(self) -> None:
        i = self.pick(lambda x: x.dim() >= 1)
        if i is None:
            return
        shape = self.tensors[i].shape
        j = self.pick(lambda x: x.shape == shape)
        assert j is not None
        k = self.one_of([i, j])
        dim = self.number(len(shape))
        if self.number(2):
            self.add(f"cat {dim}", lambda *x: torch.cat(x, dim), [i, j] if k == i else [i, j, k], fresh=True)
        else:
            self.add(f"stack {dim}", lambda *x: torch.stack(x, dim), [i, j], fresh=True)

    def clone(self) -> None:
        i = self.pick()
        assert i is not None
        if self.number(2):
            self.add("clone", lambda x: x.clone(), [i], fresh=True)
        else:
            self.add("times 1", lambda x: x * 1, [i], fresh=True)

    def in_place(self) -> None:
        """Changes a tensor, or a view, that autograd does not need as it was; on a part only what is linear."""
        fits = [
            i
            for i in reversed(range(len(self.tensors)))
            if self._group[i] not in self._frozen and self.tensors[i].numel()
        ]
        if not fits:
            self.clone()
            fits = [len(self.tensors) - 1]
            if self._group[fits[0]] in self._frozen:
                return
        i = self.one_of(fits[:6])
        x = self.tensors[i]
        whole = x._base is None
        j = self.pick(lambda s: s.shape == x.shape)
        assert j is not None
        form = self.number(9)
        # What the step changes is appended once more, so that later steps find it.
        if form == 0:
            self._change("mul_(2)", lambda x: x.mul_(0.5), [i])
        elif form == 1 and self._apart(i, j):
            self._change("add_", lambda x, y: x.add_(y), [i, j])
        elif form == 2 and self._apart(i, j):
            self._change("copy_", lambda x, y: x.copy_(y), [i, j])
        elif form == 3 and x.dim() >= 1:
            source = self.pick(lambda s: s.shape == x.shape[1:] and s.dim() >= 1)
            at = self.number(x.shape[0])
            if source is not None and self._apart(i, source):
                self._change(f"y[{at}] = x", lambda x, y: _assign(x, at, y), [i, source])
        elif form == 4 and x.dim() >= 1:
            at = self.number(x.shape[0])
            self._change(f"y[{at}] *= -1", lambda x: _negate(x, at), [i])
        elif form == 5:
            self._change("zero_ part", lambda x: x.view_as(x)[:1].zero_() if x.dim() else x.mul_(1), [i], result=False)
        elif whole and form == 6 and off(0)(x.detach()):
            self._change("relu_", lambda x: x.relu_(), [i], keeps=True)
        elif whole and form == 7:
            self._change("tanh_", lambda x: x.tanh_(), [i], keeps=True)
        elif whole and form == 8 and self._apart(i, j):
            self._change("mul_", lambda x, y: x.mul_(y), [i, j], keeps_other=True)

    def _apart(self, i: int, j: int) -> bool:
        return self._group[i] != self._group[j]

    def _change(
        self,
        text: str,
        function: Function,
        takes: list[int],
        keeps: bool = False,
        keeps_other: bool = False,
        result: bool = True,
    ) -> None:
        before = self.tensors[takes[0]].detach().clone()
        after = function(before, *[self.tensors[k].detach() for k in takes[1:]])
        if not bool((after.abs() < 6).all()):
            return
        function(*[self.tensors[k] for k in takes])
        self.graph.steps.append(Step(text, lambda *x: (function(*x), [])[1], takes))
        if keeps:
            self._frozen.add(self._group[takes[0]])
        if keeps_other:
            self._frozen.update(self._group[k] for k in takes[1:])

    def buffer(self) -> None:
        """Fills a constant tensor part by part."""
        i = self.pick(lambda x: x.dim() == 1 or (x.dim() == 2 and x.numel() <= 4))
        if i is None:
            return
        shape = self.tensors[i].shape
        j = self.pick(lambda x: x.shape == shape)
        assert j is not None
        self.add("fill rows", lambda a, b: _rows(a, b), [i, j], fresh=True)

    # -- the whole

    def build(self) -> Graph:
        shapes = [(2, 3), (3,), (2, 2), (3, 2), (1, 3), (2, 1), (), (2, 1, 3), (1, 2, 3), (1,)]
        for _ in range(self.number(3) + 1):
            self.leaf(self.one_of(shapes))
        for _ in range(self.number(7) + 2):
            getattr(self, self.one_of(self._kinds))()
        self._end(len(self.tensors) - 1)
        for _ in range(self.number(3)):
            i = self.pick()
            assert i is not None
            self._end(i)
        graph = self.graph
        leaves = [number for number, _ in graph.late]
        graph.wanted = [k for k in range(len(leaves)) if self.number(4) != 3] or [0]
        if self.number(3) == 2:
            inner = self.pick(lambda x: x.grad_fn is not None)
            graph.inner = [] if inner is None else [inner]
        # Leaves first: what was number n becomes ...
        order = leaves + [k for k in range(len(self.tensors)) if k not in set(leaves)]
        place = {old: new for new, old in enumerate(order)}
        graph.leaves = [value for _, value in graph.late]
        for step in graph.steps + graph.ends:
            step.takes = [place[k] for k in step.takes]
        graph.inner = [place[k] for k in graph.inner]
        return graph

    def _end(self, i: int) -> None:
        x = self.tensors[i].detach()
        form = self.number(6)
        target = torch.randn(x.shape, generator=self._generator, dtype=torch.float64)
        ends: list[tuple[str, Function]] = [
            ("mse", lambda x: F.mse_loss(x, target)),
            ("sum square", lambda x: x.square().sum()),
            ("mean", lambda x: x.mean()),
            ("exp sum", lambda x: (0.3 * x).exp().sum()),
            ("exp of mean", lambda x: x.mean().exp()),
            ("weighted", lambda x: (x * target).sum()),
        ]
        if x.dim() == 2 and x.shape[1] >= 2 and form in (2, 3):
            labels = torch.arange(x.shape[0]) % x.shape[1]
            ends[form] = ("cross_entropy", lambda x: F.cross_entropy(x, labels))
        text, function = ends[form]
        self.graph.ends.append(Step(text, function, [i]))


def _assign(y: Tensor, at: int, x: Tensor) -> Tensor:
    y[at] = x
    return y


def _negate(y: Tensor, at: int) -> Tensor:
    y[at] *= -1
    return y


def _rows(a: Tensor, b: Tensor) -> Tensor:
    y = a.new_zeros((3, *a.shape))
    y[0] = a
    y[2] = b
    return y


FAMILIES: dict[str, list[str]] = {
    "elementwise": ["binary"] * 6 + ["unary"] * 4 + ["view"],
    "layers": ["product"] * 4 + ["unary", "binary", "normalisation"] * 2 + ["reduction", "convolution", "join"],
    "rows": ["normalisation"] * 3 + ["reduction"] * 4 + ["binary"] * 6 + ["unary"] * 2 + ["product"],
    "views": ["view"] * 4 + ["binary"] * 4 + ["several"] * 2 + ["join"] * 2 + ["unary", "reduction", "product"],
    "in_place": ["in_place"] * 5 + ["clone"] * 2 + ["view", "binary"] * 3 + ["unary", "buffer", "join", "product"],
    "everything": [
        "binary", "binary", "unary", "unary", "product", "convolution", "reduction", "normalisation", "view", "several",
        "join", "in_place", "buffer",
    ],
}  # fmt: skip


@functools.cache
def graphs(family: str) -> st.SearchStrategy[Graph]:
    @st.composite
    def graph(draw: Any) -> Graph:
        return Builder(draw, family).build()

    return graph()
