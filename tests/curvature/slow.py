"""The curvature recursion once more, slow and obviously right, to compare the engine with. It shares nothing with it.

The engine reads autograd's graph and has a closed formula for every kind of node. Here the forward pass is recorded
instead, one aten operation after the other, as a list of functions from values to values, and no operation is known:
each is run again by itself, in double precision, and differentiated twice by autograd, entry by entry. With ``y = f(x,
...)`` and the gradient ``g`` and curvature ``h`` of its outputs, an input's are

    g_x = sum_j (dy_j/dx)   g_j
    h_x = sum_j (dy_j/dx)^2 h_j + sum_j g_j d2y_j/dx^2

starting from ``g = 1``, ``h = 0`` at the loss. Values that are used several times add up what comes from each use.

**In-place operations** make new values. On a tensor that owns its memory, ``y.mul_(x)`` is ``y' = y * x``. On a view,
it is one operation from the whole old tensor to the whole new one. All other views of that memory are views of the new
tensor from then on.

**Joined operations.** The recursion drops off-diagonal entries of curvature at every value. So that ``x * sigmoid(x)``
loses nothing, elementwise operations are joined where paths meet, and the recursion takes the joined function for one
operation. Which are joined is part of its definition:

- Candidates are the operations in ELEMENTWISE, unless in place on a view. They are visited from the loss downwards.
  One that has not been joined with an earlier one and has at least two inputs that lead to wanted tensors is a
  *meeting point*.
- A candidate further down is *taken in* if all operations that use its value (and lead from the loss to a wanted
  tensor) are taken in or are the meeting point. It is not taken in if its own curvature is wanted, if one of its uses
  is through ``t()``, or if Gauss-Newton treats it otherwise than the meeting point.
- If some value is used twice by what was taken in, the paths meet, and all is joined; else nothing is. If all paths
  pass through one value that was taken in, only what lies above the nearest such value is joined: there the paths have
  met.
- Operations in ROW_WISE that work along the last dimension are taken in like elementwise ones, if then all tensors line
  up; if they do not, only elementwise ones are. Where a source of such a composite comes from another operation that
  mixes the entries of a row, that one is taken in as well, even if others use its value.
- If no paths meet in what only serves the meeting point, elementwise operations are taken in though others use their
  values.
- If paths do meet there, but what is joined still uses two values or more, paths from two of these may meet further
  down in operations that could be taken in if nothing else used their values. Then those on the way there are taken in,
  and so on.
- An operation that others use as well is carried a second time on its own, with what arrives from these.
- Only what lies on the way to a value that is used twice is kept.
- The joined function's variables are the values that it uses from outside. ``x`` and ``x.t()`` are two variables, but
  ``x.t()`` and another ``x.t()`` are one, and ``x.t().t()`` is ``x``.

What is not here: Becker and LeCun's method; operations that torch cannot differentiate twice, as fused attention and
the CTC loss; random ones that draw and apply their numbers in one; custom functions, of which only the inside is seen.

**Gauss-Newton** drops the second-derivative term of every operation from which a parameterised operation lies on some
path to the loss; one is parameterised if a wanted leaf enters it directly or through the operations in VIEWS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten


def _words(text: str) -> set[str]:
    return set(text.split())


#: aten operations, without overload and without the underscore of the form that works in place, which may be joined.
ELEMENTWISE = _words(
    """
    add sub rsub mul div pow addcmul addcdiv lerp maximum minimum fmax fmin atan2 hypot logaddexp logaddexp2 xlogy
    relu relu6 tanh sigmoid hardswish hardsigmoid silu mish log_sigmoid_forward gelu leaky_relu rrelu_with_noise
    elu celu softplus hardtanh threshold hardshrink softshrink _prelu_kernel clamp clamp_min clamp_max exp exp2
    expm1 log log2 log10 log1p sqrt rsqrt reciprocal sin cos tan asin acos atan sinh cosh asinh acosh atanh erf
    erfc lgamma digamma abs neg round floor ceil trunc sign logit
    angle copysign deg2rad erfinv fmod frac frexp i0 igamma igammac ldexp mvlgamma nan_to_num native_dropout polygamma
    rad2deg remainder sgn sinc special_entr special_erfcx special_i0e special_i1 special_i1e special_log_ndtr
    special_ndtri special_xlog1py special_zeta
    """
)

#: Losses that sum over entries, in which paths may meet, but which are not taken in.
MEETING_LOSSES = {"binary_cross_entropy", "binary_cross_entropy_with_logits"}

#: Operations that may be joined where they work along the last dimension.
ROW_WISE = _words(
    "sum mean logsumexp _softmax _log_softmax gather max min var std unsqueeze squeeze expand where masked_fill"
)

#: Operations that only rearrange, select from, or cast one tensor: a parameter behind them is still a parameter.
VIEWS = _words(
    """
    t transpose permute view _unsafe_view reshape _reshape_alias expand slice select squeeze unsqueeze split
    split_with_sizes unsafe_split unsafe_split_with_sizes unbind diagonal as_strided unfold alias clone contiguous
    _to_copy copy_ lift_fresh diag_embed flip roll rot90 repeat tril triu narrow_copy pixel_shuffle pixel_unshuffle
    channel_shuffle im2col col2im constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d index index_select gather take masked_select masked_fill
    _pack_padded_sequence
    """
)

#: Operations without derivative, though their results are floating-point numbers.
CONSTANT = _words(
    """
    detach empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros new_ones new_full
    bernoulli zero_ fill_ uniform_ normal_ bernoulli_
    """
)


def _hardsigmoid(x: Tensor) -> Tensor:
    return F.relu6(x + 3) / 6


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    norm = v.square().sum([d for d in range(v.dim()) if d != dim], keepdim=True).sqrt()
    return v * (g / norm), norm


def _cdist(a: Tensor, b: Tensor, p: float, mode: int | None) -> Tensor:
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).abs().pow(p).sum(-1).pow(1 / p)


def _multi_margin(
    x: Tensor, target: Tensor, p: int = 1, margin: float = 1, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    own = x.gather(1, target.unsqueeze(1))
    loss = (margin - own + x).clamp(min=0) ** p
    if weight is not None:
        loss = loss * weight[target].unsqueeze(1)
    loss = loss.scatter(1, target.unsqueeze(1), 0).sum(1) / x.shape[1]
    return (loss, loss.mean(), loss.sum())[reduction]


#: The same functions of operations that torch differentiates twice, for those that it does not (or not correctly).
TWICE_DIFFERENTIABLE: dict[str, Callable[..., Any]] = {
    "hardsigmoid": _hardsigmoid,
    "hardsigmoid_": _hardsigmoid,
    "_weight_norm_interface": _weight_norm,
    "_cdist_forward": _cdist,
    "multi_margin_loss": _multi_margin,
}


class CannotReplay(NotImplementedError):
    """An operation gives something else when it is run again: it is random, or needs the memory around its inputs."""


@dataclass(eq=False)
class Value:
    """What a tensor held between two changes: an output of an operation, or a leaf."""

    saved: Tensor
    producer: Operation | None = None
    number: int = 0


@dataclass(eq=False)
class Operation:
    """One recorded operation: a function of the values that have a gradient; all else is part of the function."""

    name: str
    function: Callable[[Sequence[Tensor]], list[Tensor]]
    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)  # by the names of its schema
    on_part: bool = False  # in place on a view: from the whole old tensor to the whole new one

    @property
    def elementwise(self) -> bool:
        return self.name.removesuffix("_") in ELEMENTWISE and not self.on_part

    @property
    def view(self) -> bool:
        return self.name in VIEWS and not self.on_part

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return self.function(inputs)


@dataclass
class Row:
    """How an operation works along the last dimension: whether its result has lost it (None: as its input), and whether
    an entry of the result depends on several of the input."""

    flat: bool | None
    mixes: bool


def row_of(op: Operation, leads: Callable[[Value], bool]) -> Row | None:
    """None for an operation that does not work along the last dimension; ``leads`` tells which inputs count."""
    name = op.name.removesuffix("_")
    if op.on_part or name not in ROW_WISE:
        return None
    before, after, arguments = op.inputs[0].saved.shape, op.outputs[0].saved.shape, op.arguments
    if name in ("where", "masked_fill"):  # where a mask replaces some entries of one tensor
        other = arguments["other" if name == "where" else "value"]
        fixed = not isinstance(other, Tensor) or (name == "where" and not other.requires_grad)
        if name == "where" and len(op.inputs) == 2:
            fixed = not leads(op.inputs[1])
        return Row(None, False) if (len(op.inputs) == 1 or name == "where") and fixed and before == after else None
    if op.name == "expand":
        return Row(None, False) if len(before) == len(after) else None
    dims = arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    rank = len(after) if op.name == "unsqueeze" else len(before)
    if not dims or len(dims) != 1 or rank == 0 or dims[0] % rank != rank - 1:
        return None
    if op.name == "unsqueeze":
        return Row(False, False)
    if op.name == "squeeze":
        return Row(True, False) if before[-1] == 1 else None
    if op.name == "gather":
        index = arguments["index"].shape
        return Row(False, True) if index[-1] == 1 and index[:-1] == before[:-1] else None
    return Row(None if op.name in ("_softmax", "_log_softmax") else len(after) < len(before), True)


class Recording(TorchDispatchMode):
    """Records what happens to tensors that require grad while it is active.

    >>> with Recording() as recording:
    ...     w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    ...     loss = (w**3).sum()
    >>> recording.curvature(loss, [w])
    [tensor([ 6., 12.], dtype=torch.float64)]
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._values: dict[int, Value] = {}  # by id of the tensor object
        self._bases: dict[int, Tensor] = {}  # of each view
        self._views: dict[int, list[Tensor]] = {}  # of each base
        self._stale: set[int] = set()  # views of a base that was changed
        self._alive: list[Any] = []  # so that no id is used twice

    # -- forward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        flat, spec = tree_flatten((args, kwargs))
        changed = args[0] if name.endswith("_") and not name.startswith("__") else None
        base = None if changed is None else self._bases.get(id(changed))
        tracked = torch.is_grad_enabled()
        # An operation that works in place on a part takes the whole tensor for the part.
        slots = [i for i, a in enumerate(flat) if isinstance(a, Tensor)]
        taken = [flat[i] for i in slots]
        if base is not None:
            taken[next(k for k, t in enumerate(taken) if t is changed)] = base
        values = [self._value(t) for t in taken] if tracked else []
        inputs = [(i, v) for i, v in zip(slots, values, strict=False) if v is not None]
        wholes = {i: _snapshot(t) for i, t in zip(slots, taken, strict=True)} if inputs else {}
        if base is not None and changed is not None:
            size, stride = changed.shape, changed.stride()
            part = size, stride, changed.storage_offset() - base.storage_offset()
        else:
            part = None

        out = func(*args, **kwargs)
        self._alive.append((args, kwargs, out))
        outputs = [o for o in tree_flatten(out)[0] if isinstance(o, Tensor)]
        if changed is None and any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        ):
            source = flat[slots[0]]
            for o in outputs:
                if o is not source and name != "detach":
                    owner = self._bases.get(id(source), source)
                    self._bases[id(o)] = owner
                    self._views.setdefault(id(owner), []).append(o)
        if changed is not None:
            outputs = [changed if base is None else base]
            if tracked:
                self._stale.update(id(v) for v in self._views.get(id(outputs[0]), ()))
        if not tracked or not inputs or (name in CONSTANT and changed is None):
            return out
        if name in CONSTANT:  # y.zero_(): nothing is left of y; of a part of y, the rest is
            inputs = inputs if part is not None else []

        places = [i for i, _ in inputs]
        which = (
            next((i for i, t in zip(slots, taken, strict=True) if t is outputs[0]), -1) if changed is not None else -1
        )

        def function(tensors: Sequence[Tensor]) -> list[Tensor]:
            again = list(flat)
            for i, whole in wholes.items():
                again[i] = whole
            for i, t in zip(places, tensors, strict=True):
                again[i] = t
            whole = None
            if which >= 0:
                again[which] = whole = again[which].clone()
                if part is not None:
                    again[which] = whole.as_strided(*part)
            a, k = tree_unflatten(again, spec)
            result = TWICE_DIFFERENTIABLE.get(name, func)(*a, **k)
            if whole is not None:
                return [whole if part is not None or name not in TWICE_DIFFERENTIABLE else result]
            return [r for r in tree_flatten(result)[0] if isinstance(r, Tensor)]

        arguments = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        operation = Operation(name, function, [v for _, v in inputs], arguments=arguments, on_part=part is not None)
        self._append(operation, outputs)
        return out

    def _append(self, operation: Operation, tensors: Sequence[Tensor]) -> None:
        operation.outputs = [Value(_snapshot(t), operation, k) for k, t in enumerate(tensors)]
        self.operations.append(operation)
        for t, value in zip(tensors, operation.outputs, strict=True):
            self._stale.discard(id(t))
            if t.is_floating_point():
                self._values[id(t)] = value

    def _value(self, t: Tensor) -> Value | None:
        """The value of a tensor, None if it has no gradient."""
        if not t.is_floating_point():
            return None
        known = id(t) in self._values
        base = self._bases.get(id(t))
        if base is not None and id(t) in self._stale:
            whole = self._value(base)
            if whole is None:
                return None
            part = t.shape, t.stride(), t.storage_offset() - base.storage_offset()
            self._append(Operation("as_strided", lambda x: [x[0].as_strided(*part)], [whole]), [t])
        elif not known and t.is_leaf and t.requires_grad:
            self._values[id(t)] = Value(_snapshot(t))
            self._alive.append(t)
        return self._values.get(id(t))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)

    # -- backward

    def curvature(self, loss: Tensor, wanted: Iterable[Tensor], method: str = "hesscale") -> list[Tensor | None]:
        """The diagonal of each wanted tensor; None for those that the loss does not depend on.

        Raises:
            CannotReplay: An operation gives something else when it is run again.
        """
        goals = [self._value(t) for t in wanted]
        return _Sweep(self, loss, {v for v in goals if v is not None}, method).run(goals)

    def gradient(self, loss: Tensor, wanted: Iterable[Tensor]) -> list[Tensor | None]:
        """Gradients by the same way, to see whether what was recorded is what was computed."""
        goals = [self._value(t) for t in wanted]
        sweep = _Sweep(self, loss, {v for v in goals if v is not None}, "hesscale")
        sweep.run(goals)
        return [None if v is None else sweep.g.get(v) for v in goals]


Variable = tuple[Value, bool]  # a value, and whether it is transposed


class Joined(NamedTuple):
    """Operations taken for one, and those of them that are not carried on their own as well."""

    members: list[Operation]
    absorbed: set[Operation]


class _Sweep:
    def __init__(self, recording: Recording, loss: Tensor, goals: set[Value], method: str) -> None:
        root = recording._value(loss)
        assert root is not None
        assert method in ("hesscale", "hesscale_gn")
        self.root, self.goals, self.gauss_newton = root, goals, method == "hesscale_gn"
        order = recording.operations
        below: set[Value] = set()  # values that depend on a wanted one, or are one
        for v in (root, *(v for op in order for v in (*op.inputs, *op.outputs))):
            if v in goals:
                below.add(v)
        for op in order:
            if any(v in below for v in op.inputs):
                below.update(op.outputs)
        above: set[Value] = {root}  # values that the loss depends on
        for op in reversed(order):
            if any(v in above for v in op.outputs):
                above.update(op.inputs)
        self.between = below & above
        #: From the loss downwards.
        self.order = [op for op in reversed(order) if any(v in self.between for v in op.outputs)]
        self.g: dict[Value, Tensor] = {root: torch.ones_like(root.saved)}
        self.h: dict[Value, Tensor] = {root: torch.zeros_like(root.saved)}
        self._users: dict[Operation, list[Operation]] = {}
        self.inside = self._inside()

    # -- structure

    def leads(self, v: Value) -> bool:
        """Whether the value is between the loss and a wanted tensor."""
        return v in self.between

    def variables(self, op: Operation) -> list[Variable]:
        """The inputs that lead to wanted tensors, as they count for joining."""
        return [self.variable(v) for v in op.inputs if self.leads(v)]

    def variable(self, v: Value) -> Variable:
        turned = False
        while v.producer is not None and v.producer.name == "t" and v not in self.goals:
            v, turned = v.producer.inputs[0], not turned
        return v, turned

    def _inside(self) -> set[Operation]:
        """Operations with a parameterised one between them and the loss."""
        parameters = {v for v in self.goals if v.producer is None}
        for op in reversed(self.order):
            if op.view and any(v in parameters for v in op.inputs):
                parameters.update(op.outputs)
        inside: set[Operation] = set()
        for op in self.order:
            if op in inside or (not op.view and any(v in parameters for v in op.inputs)):
                inside.update(v.producer for v in op.inputs if v.producer is not None)
        return inside if self.gauss_newton else set()

    def below(self, op: Operation) -> list[Operation]:
        """The operations that its inputs come from."""
        return [v.producer for v, _ in self.variables(op) if v.producer is not None]

    def users(self, op: Operation) -> list[Operation]:
        """The operations that use any of its values."""
        if not self._users:
            for user in self.order:
                for maker in self.below(user):
                    self._users.setdefault(maker, []).append(user)
        return self._users.get(op, [])

    def joined(self, meeting: Operation) -> Joined | None:
        """What is joined with an operation, if paths meet in it."""
        if not (meeting.elementwise or meeting.name in MEETING_LOSSES) or len(self.variables(meeting)) < 2:
            return None
        if meeting.elementwise:
            private = self._private(meeting, rows=True)
            for members in (self._widened(private, meeting, rows=True), private):
                if any(row_of(op, self.leads) for op in members):
                    members = self._through_mixing(members, meeting)
                    if self._line_up(members):
                        return self._described(meeting, members)
        members = self._widened(self._private(meeting, rows=False), meeting, rows=False) or self._shared(meeting)
        return self._described(meeting, members) if members else None

    def _described(self, meeting: Operation, members: set[Operation]) -> Joined:
        ordered = [op for op in self.order if op in members]
        absorbed = {meeting}
        for op in ordered:
            if op is not meeting and all(user in absorbed for user in self.users(op)):
                absorbed.add(op)
        return Joined(ordered, absorbed)

    def _may_join(self, op: Operation, meeting: Operation, rows: bool) -> bool:
        return (
            (op.elementwise or (rows and row_of(op, self.leads) is not None))
            and not any(v in self.goals for v in op.outputs)
            and (op in self.inside) == (meeting in self.inside)
            and all(
                v is op.outputs[0] and not turned
                for user in self.users(op)
                for v, turned in self.variables(user)
                if v.producer is op
            )
        )

    def _private(self, meeting: Operation, rows: bool) -> set[Operation]:
        """The meeting point and what only serves it, down to where all paths have met; nothing if none meet."""
        taken = [meeting]
        for op in self.order[self.order.index(meeting) + 1 :]:
            uses = self.users(op)
            if uses and all(user in taken for user in uses) and self._may_join(op, meeting, rows):
                taken.append(op)
        for neck in taken[1:]:
            above = self._above(meeting, neck, taken)
            ends = {v for op in above for v in self.variables(op) if v[0].producer not in above}
            if ends == {(neck.outputs[0], False)}:
                return self._on_the_way(above)
        return self._on_the_way(set(taken))

    def _above(self, meeting: Operation, neck: Operation, taken: list[Operation]) -> set[Operation]:
        """What can be reached from the meeting point without passing the neck."""
        reached = {meeting}
        for op in taken:
            if op in reached:
                reached.update(maker for maker in self.below(op) if maker in taken and maker is not neck)
        return reached

    def _widened(self, members: set[Operation], meeting: Operation, rows: bool) -> set[Operation]:
        """``members``, and what lies between two values that they use and one where paths from both meet; and so on."""
        wider = self._wider(members, meeting, rows)
        return members if wider == members else self._widened(wider, meeting, rows)

    def _wider(self, members: set[Operation], meeting: Operation, rows: bool) -> set[Operation]:
        outside = {v for op in members for v in self.variables(op) if v[0].producer not in members}
        reached: dict[Variable, set[Variable]] = {}  # from which of these values
        passed: set[Operation] = set()
        for start in outside:
            seen = [start]
            for v in seen:
                reached.setdefault(v, set()).add(start)
                op = v[0].producer
                if op is not None and self._may_join(op, meeting, rows):
                    passed.add(op)
                    seen += [w for w in dict.fromkeys(self.variables(op)) if w not in seen]
        between: set[Operation] = set()
        for op in reversed(self.order):
            if op in passed and any(len(reached[v]) > 1 or v[0].producer in between for v in self.variables(op)):
                between.add(op)
        return self._on_the_way(members | between)

    def _shared(self, meeting: Operation) -> set[Operation]:
        """Elementwise operations on the way to where paths meet, though others use their results."""
        taken = {meeting}
        for op in self.order:
            if op not in taken and any(user in taken for user in self.users(op)) and self._may_join(op, meeting, False):
                taken.add(op)
        return self._on_the_way(taken)

    def _on_the_way(self, taken: set[Operation]) -> set[Operation]:
        """Those of ``taken`` below which some value is used twice by ``taken``."""
        uses = [v for op in taken for v in self.variables(op)]
        leads: set[Operation] = set()
        for op in reversed(self.order):
            if op in taken and any(uses.count(v) > 1 or v[0].producer in leads for v in self.variables(op)):
                leads.add(op)
        return leads

    def _through_mixing(self, members: set[Operation], meeting: Operation) -> set[Operation]:
        """Where sources of a composite along rows come from another mixing operation, that one too, and so on."""
        members = set(members)
        waiting = [op for member in members for op in self.below(member) if op not in members]
        while waiting:
            passed = self._down_to_mixing(waiting.pop(), meeting)
            members |= passed
            waiting += [op for member in passed for op in self.below(member) if op not in members]
        return members

    def _down_to_mixing(self, op: Operation, meeting: Operation) -> set[Operation]:
        passed: set[Operation] = set()
        while self._may_join(op, meeting, rows=True):
            passed.add(op)
            row = row_of(op, self.leads)
            if row is not None and row.mixes:
                return passed
            if len(self.variables(op)) > 1:
                further = self.joined(op)
                rowwise = further is not None and any(row_of(member, self.leads) for member in further.members)
                return passed | set(further.members) if further is not None and rowwise else set()
            if not self.below(op):
                return set()
            (op,) = self.below(op)
        return set()

    def _line_up(self, members: set[Operation]) -> bool:
        """Whether no tensor that has lost its rows' dimension meets one that has it, and all rows are the same ones."""
        flat: dict[Operation, bool] = {}
        sources: dict[Variable, bool] = {}
        widths: set[int] = set()
        for op in reversed(self.order):
            if op not in members:
                continue
            row = row_of(op, self.leads)
            inner = {flat[maker] for maker in self.below(op) if maker in members}
            takes_flat = row.flat is False and not row.mixes if row is not None else True in inner
            if inner - {takes_flat}:
                return False
            for v in self.variables(op):
                if v[0].producer not in members and sources.setdefault(v, takes_flat) is not takes_flat:
                    return False
            flat[op] = takes_flat if row is None or row.flat is None else row.flat
            shapes = [] if row is None or takes_flat else [op.inputs[0].saved.shape]
            shapes += [] if flat[op] else [op.outputs[0].saved.shape]
            widths.update(shape[-1] for shape in shapes if shape and shape[-1] != 1)
        return len(widths) <= 1

    # -- numbers

    def run(self, goals: Sequence[Value | None]) -> list[Tensor | None]:
        absorbed: set[Operation] = set()
        for op in self.order:
            if op in absorbed:
                continue
            joined = self.joined(op)
            if joined is not None:
                absorbed |= joined.absorbed
                self._through(op, *self._joined_function(joined.members))
            else:
                wanted = [self.leads(v) for v in op.inputs]
                self._through(op, op.run, [(v, False) for v in op.inputs], wanted)
        return [None if v is None or not self.leads(v) else self.h.get(v, torch.zeros_like(v.saved)) for v in goals]

    def _joined_function(
        self, members: list[Operation]
    ) -> tuple[Callable[[Sequence[Tensor]], list[Tensor]], list[Variable], list[bool]]:
        produced = {op.outputs[0]: op for op in members}
        variables = list(dict.fromkeys(v for op in members for v in self.variables(op) if v[0] not in produced))

        def function(tensors: Sequence[Tensor]) -> list[Tensor]:
            known = dict(zip(variables, tensors, strict=True))
            for op in reversed(members):
                inputs = [known[self.variable(v)] if self.leads(v) else v.saved for v in op.inputs]
                known[(op.outputs[0], False)] = op.run(inputs)[0]
            return [known[(members[0].outputs[0], False)]]

        return function, variables, [True] * len(variables)

    def _through(
        self,
        op: Operation,
        function: Callable[[Sequence[Tensor]], list[Tensor]],
        variables: list[Variable],
        wanted: list[bool],
    ) -> None:
        """Carries gradient and curvature from an operation's outputs to its variables."""
        arrived = [k for k, v in enumerate(op.outputs) if v in self.g]
        if not arrived:
            return
        xs = [
            (v.saved.t() if turned else v.saved).detach().requires_grad_(want)
            for (v, turned), want in zip(variables, wanted, strict=True)
        ]
        with torch.enable_grad():
            outputs = function(xs)
        for v, y in zip(op.outputs, outputs, strict=True):
            if v.saved.shape != y.shape or not torch.allclose(v.saved, y.to(v.saved), 1e-10, 1e-13, equal_nan=True):
                raise CannotReplay(op.name)
        inputs = [x for x, want in zip(xs, wanted, strict=True) if want]
        into = [variable for variable, want in zip(variables, wanted, strict=True) if want]
        g_x = [torch.zeros(x.numel(), dtype=x.dtype) for x in inputs]
        h_x = [torch.zeros(x.numel(), dtype=x.dtype) for x in inputs]
        ys = [(outputs[k], self.g[op.outputs[k]], self.h[op.outputs[k]]) for k in arrived if outputs[k].requires_grad]
        for y, g, h in ys:
            rows = [torch.autograd.grad(y, inputs, e, retain_graph=True, allow_unused=True) for e in _units(y)]
            for k in range(len(inputs) if rows else 0):
                if rows[0][k] is not None:
                    jacobian = torch.stack([row[k].reshape(-1) for row in rows])
                    g_x[k] += g.reshape(-1) @ jacobian
                    h_x[k] += h.reshape(-1) @ jacobian.square()
        if ys and op not in self.inside:
            slopes = torch.autograd.grad(
                [y for y, _, _ in ys], inputs, [g for _, g, _ in ys], create_graph=True, allow_unused=True
            )
            h_x = [h + _second(x, slope) for x, slope, h in zip(inputs, slopes, h_x, strict=True)]
        for (v, turned), x, g, h in zip(into, inputs, g_x, h_x, strict=True):
            g, h = g.view(x.shape), h.view(x.shape)
            g, h = (g.t(), h.t()) if turned else (g, h)
            self.g[v] = self.g[v] + g if v in self.g else g
            self.h[v] = self.h[v] + h if v in self.h else h


def _second(x: Tensor, slope: Tensor | None) -> Tensor:
    """The diagonal of the derivative of ``slope``, of x's shape, by ``x``, as a vector."""
    found = torch.zeros(x.numel(), dtype=x.dtype)
    if slope is None or not slope.requires_grad or slope.numel() == 0:
        return found
    if torch.autograd.grad(slope.sum(), x, retain_graph=True, allow_unused=True)[0] is None:
        return found
    for i, unit in enumerate(_units(slope)):
        (row,) = torch.autograd.grad(slope, x, unit, retain_graph=True, allow_unused=True)
        found[i] = row.reshape(-1)[i]
    return found


def _units(y: Tensor) -> Iterable[Tensor]:
    return torch.eye(y.numel(), dtype=y.dtype).view(y.numel(), *y.shape)


def _snapshot(t: Tensor) -> Tensor:
    """A copy with memory of its own, laid out in the same way, overlaps included."""
    t = t.detach()
    if t.numel() == 0:
        return t.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((span,), (1,)).clone().as_strided(t.shape, t.stride())
