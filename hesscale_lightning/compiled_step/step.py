"""A training step as one program: forward, backward, curvature, and the optimizer's update where it is AdaHesScale's.

:class:`Step` keeps the programs of a function of modules and batches: it looks up the one that fits, or has one
captured (:mod:`.capture`) and compiled (:mod:`.programs`), and hands out what it computed. Its public form is
:func:`hesscale_lightning.compile_step`.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from hesscale_lightning.compiled_step.capture import CaptureError, capture, exchanged
from hesscale_lightning.compiled_step.guards import (
    TENSORS,
    ModuleState,
    Spec,
    batch_key,
    flatten,
    is_short,
    surroundings,
    unflatten,
)
from hesscale_lightning.compiled_step.programs import Backend, Progress, Runner, compile_graph
from hesscale_lightning.compiled_step.update import Update, can_be_captured, can_measure, clip, is_measured
from hesscale_lightning.curvature.engine import METHODS, Method, attach
from hesscale_lightning.curvature.registry import UnsupportedOperationError

OnFailure = Literal["eager", "raise"]
ShortBatch = Literal["eager", "compile"]


class _Root(nn.Module):
    """Holds the modules of a step, so that the tensors of all can be exchanged at once."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        for k, module in enumerate(modules):
            self.add_module(str(k), module)


@dataclass
class _Program:
    """A step that runs.

    Attributes:
        run: What was compiled.
        constants: Its last inputs.
        changes: Those of its inputs that it may change without autograd's taking note.
        grads: Positions of the parameters whose gradients it returns, in their order.
        diagonals: Those whose diagonals it returns, likewise.
        others: How the function's further results are put together, None if it returns the loss alone.
        others_values: These results' leaves; ... stands for a tensor that the program returns.
        records: What the update's records have in common.
        told: How many numbers the update returns.
        refreshing: Whether there is curvature.
        autocast: Whether autocast has to be switched off while it runs.
    """

    run: Runner
    constants: list[Tensor]
    grads: list[int]
    diagonals: list[int]
    others: Spec | None
    others_values: list[Any]
    records: list[Any]
    told: int
    refreshing: bool
    autocast: bool
    changes: slice


@dataclass
class Computed:
    """What a step has computed: the loss, further results, and gradients and diagonals beside their parameters."""

    loss: Tensor
    others: tuple[Any, ...]
    params: list[Tensor]
    grads: Sequence[Tensor]
    curved: list[Tensor]
    diagonals: Sequence[Tensor]


@dataclass
class Settings:
    """How programs are made and kept; see :func:`compile_step`."""

    backend: Backend = "inductor"
    on_failure: OnFailure = "eager"
    short_batch: ShortBatch = "eager"
    max_programs: int = 8
    options: dict[str, Any] | None = None
    silent: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("backend", get_args(Backend)),
            ("on_failure", get_args(OnFailure)),
            ("short_batch", get_args(ShortBatch)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if not isinstance(self.max_programs, int) or self.max_programs < 1:
            raise ValueError(f"max_programs must be at least 1, got {self.max_programs!r}")


class Step:
    """A function of batches, run as programs.

    Args:
        modules: All modules whose tensors the function uses.
        function: Maps a batch to the loss, or to a tuple of the loss and further results.
        method: As for :func:`compile_step`; may be set at any time.
        optimizer: As for :func:`compile_step`.
        max_grad_norm: As for :func:`compile_step`.
        keep_gradients: As for :func:`compile_step`.
        settings: How programs are made and kept.
        name: For messages.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        function: Callable[..., Any],
        *,
        method: Method | None,
        optimizer: Optimizer | None = None,
        max_grad_norm: float | None = None,
        keep_gradients: bool = False,
        settings: Settings,
        name: str,
    ) -> None:
        if method is not None and method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)} or None, got {method!r}")
        if max_grad_norm is not None and optimizer is None:
            raise ValueError(
                f"max_grad_norm={max_grad_norm} without an optimizer: clip p.grad with "
                "torch.nn.utils.clip_grad_norm_ after the step, or pass optimizer="
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be > 0 or None, got {max_grad_norm}")
        self.method = method
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.keep_gradients = keep_gradients
        self.settings = settings
        self.name = name
        #: Called with the batch before a step that the optimizer's radius measures; without it they run eagerly.
        self.look_before: Callable[..., None] | None = None
        self.modules = list(modules)
        self._function = function
        self._forget()

    def _forget(self) -> None:
        self._root: _Root | None = None
        self._programs: dict[Any, _Program] = {}
        self._eager: set[Any] = set()  # keys of steps that run eagerly
        self._told: set[str] = set()  # reasons why
        self._update: Update | None = None
        self._failure: Exception | None = None  # of a program that was just tried

    def __getstate__(self) -> dict[str, Any]:
        made = ("_root", "_state", "_programs", "_eager", "_told", "_update", "_failure")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def clear(self) -> None:
        """Forgets all programs, as after a change that a step cannot see: of a number or a function that it uses."""
        self._forget()

    @property
    def programs(self) -> int:
        """How many programs are kept."""
        return len(self._programs)

    def __call__(self, *batch: Any) -> Any:
        """Makes the step.

        Returns:
            The loss, detached; if the function returns a tuple, that tuple, all its tensors detached.
        """
        measured = is_measured(self.optimizer)
        if measured and (self.look_before is None or not can_measure(self.optimizer)):
            return self.eagerly(*batch)
        key, program, inputs, update = self._look_up(batch)
        if program is None:
            return self._eagerly(batch, key)
        if measured and self.look_before is not None:
            self.look_before(*batch)
        return self._run(program, inputs, update, measured=measured)

    def eagerly(self, *batch: Any) -> Any:
        """The same step without a program; for once, for example to look at ``p.hess_diag`` from a hook."""
        self._read_state()
        return self._eagerly(batch, None)

    def compute(self, *batch: Any) -> Computed | None:
        """Runs the program for a batch and hands nothing out; for a step without an optimizer.

        Returns:
            What it computed; None if the step has to run eagerly.
        """
        key, program, inputs, _ = self._look_up(batch)
        if program is None:
            self._note_failure(key)
            return None
        results = self._execute(program, inputs)
        first = 1 + len(program.grads)
        second = first + len(program.diagonals)
        params = self._state.params
        return Computed(
            results[0],
            self._others(program, results[second:]),
            [params[k] for k in program.grads],
            results[1:first],
            [params[k] for k in program.diagonals],
            results[first:second],
        )

    def _look_up(self, batch: tuple[Any, ...]) -> tuple[Any, _Program | None, list[Tensor], Update | None]:
        """The key of a step, the program for it, None if it is to run eagerly, and what the program takes."""
        state = self._read_state()
        leaves, spec = flatten(batch)
        optimizer, update, updating = self.optimizer, None, None
        averages: list[Tensor] = []
        numbers = None
        if optimizer is not None and can_be_captured(optimizer):
            update = self._update
            if update is None or not update.belongs_to(optimizer):
                update = self._update = Update(optimizer, state.params)  # type: ignore[arg-type]
            averages, numbers, count_of = update.prepare()
            updating = (update.options(), count_of, self.max_grad_norm, self.keep_gradients)
        device_type = state.params[0].device.type if state.params else "cpu"
        key = (batch_key(leaves), spec, self.method, state.key(), surroundings(device_type), updating)
        try:
            program = self._programs.get(key)
        except TypeError as error:  # unhashable
            if self.settings.on_failure == "raise":
                raise CaptureError(f"{self.name} got an argument that is no tensor and has no hash: {error}") from error
            self._tell(
                f"it got an argument that is no tensor and has no hash ({error}): pass tensors, numbers, strings"
            )
            return None, None, [], None
        inputs = [*state.params, *state.buffers, *averages]
        inputs += leaves if spec is TENSORS else [x for x in leaves if isinstance(x, Tensor)]
        if numbers is not None:
            inputs.append(numbers)
        if program is None and self._wants_program(key):
            try:
                program = self._programs[key] = self._make(inputs, leaves, spec, update, key)
            except Exception as error:
                if self.settings.on_failure == "eager":
                    self._failure = error
                elif isinstance(error, (CaptureError, UnsupportedOperationError)):
                    raise
                else:
                    raise CaptureError(f"{self.name} cannot become a program: {reason_of(error)}") from error
        return key, program, inputs, update

    def _read_state(self) -> ModuleState:
        if self._root is None:
            self._root = _Root(self.modules)
            self._state = ModuleState(self._root)
        if self._state.changed():
            self._programs.clear()
            self._eager.clear()
            self._update = None
        return self._state

    # -- running

    def _execute(self, program: _Program, inputs: list[Tensor]) -> Sequence[Any]:
        changed = inputs[program.changes]
        inputs += program.constants
        grad_mode = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            if program.autocast:
                with torch._C._DisableAutocast():
                    results = program.run(inputs)
            else:
                results = program.run(inputs)
            if changed:
                torch.autograd.graph.increment_version(changed)
        finally:
            torch._C._set_grad_enabled(grad_mode)
        return results

    def _run(self, program: _Program, inputs: list[Tensor], update: Update | None, *, measured: bool) -> Any:
        optimizer = self.optimizer
        results = self._execute(program, inputs)
        if update is not None:
            self._clear(update.held)
        elif optimizer is not None:
            optimizer.zero_grad()
        first = 1 + len(program.grads)
        second = first + len(program.diagonals)
        third = second + program.told
        self._hand_out(program, results[1:first], results[first:second])
        if update is not None:
            clipping = self.max_grad_norm is not None
            update.finish(
                results[second:third],
                program.records,
                refreshing=program.refreshing,
                clipping=clipping,
                measured=measured,
            )
        elif optimizer is not None:
            self._update_eagerly(optimizer)
        return results[0] if program.others is None else (results[0], *self._others(program, results[third:]))

    @staticmethod
    def _others(program: _Program, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """What the function returned beside the loss."""
        if program.others is None:
            return ()
        given = iter(tensors)
        others: tuple[Any, ...] = tree_unflatten(
            [next(given) if x is ... else x for x in program.others_values], program.others
        )
        return others

    def _clear(self, positions: Iterable[int]) -> None:
        params = self._state.params
        for k in positions:
            p = params[k]
            if p.grad is not None:
                p.grad = None
            if getattr(p, "hess_diag", None) is not None:
                p.hess_diag = None  # type: ignore[attr-defined]

    def _hand_out(self, program: _Program, grads: Sequence[Tensor], diagonals: Sequence[Tensor]) -> None:
        """Adds to ``p.grad`` and ``p.hess_diag``, as backward would."""
        params = self._state.params
        fresh = set()
        for k, g in zip(program.grads, grads, strict=True):
            p = params[k]
            if p.grad is None:
                p.grad = g
                fresh.add(k)
            else:
                with torch.no_grad():
                    p.grad.add_(g)
        for k, h in zip(program.diagonals, diagonals, strict=True):
            p = params[k]
            earlier = None if k in fresh else getattr(p, "hess_diag", None)
            p.hess_diag = h if earlier is None else earlier + h  # type: ignore[attr-defined]
        for k in program.grads:
            hooks = params[k]._post_accumulate_grad_hooks
            if hooks:
                for hook in list(hooks.values()):
                    hook(params[k])

    def _eagerly(self, batch: tuple[Any, ...], key: Any) -> Any:
        """The step without a program. It raises what is wrong with the step itself before anything is said of that."""
        optimizer = self.optimizer
        with torch.enable_grad():
            if optimizer is not None:
                optimizer.zero_grad()
            result = self._function(*batch)
            loss = result[0] if isinstance(result, tuple) else result
            if self.method is not None:
                attach(loss, [p for p in self._state.params if p.requires_grad], method=self.method)
            loss.backward()
        if optimizer is not None:
            self._update_eagerly(optimizer)
        self._note_failure(key)
        return tree_map_only(Tensor, Tensor.detach, result)

    def _update_eagerly(self, optimizer: Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm)
        optimizer.step()
        if not self.keep_gradients:
            for p in params:
                p.grad = p.hess_diag = None

    # -- making programs

    def _wants_program(self, key: Any) -> bool:
        """Whether a step that has no program is to get one."""
        if key in self._eager:
            return False
        if self.settings.short_batch == "eager" and any(
            other[1:] == key[1:] and is_short(key[0], other[0]) for other in self._programs
        ):
            self._run_eagerly_from_now_on(key)
            return False
        if len(self._programs) >= self.settings.max_programs:
            self._tell(
                f"there are {len(self._programs)} programs, and max_programs allows no more: batches of other shapes, "
                "dtypes or arguments and modules in other modes run eagerly. Give batches one shape, or raise "
                "max_programs; clear() forgets the programs"
            )
            return False
        return True

    def _run_eagerly_from_now_on(self, key: Any) -> None:
        if len(self._eager) >= 256:
            self._eager.clear()
        self._eager.add(key)

    def _note_failure(self, key: Any) -> None:
        """Remembers and tells that a program could not be made."""
        error, self._failure = self._failure, None
        if error is not None:
            self._run_eagerly_from_now_on(key)
            self._tell(f"it cannot become a program: {reason_of(error)}")

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"{self.name} runs eagerly, because {reason}.", stacklevel=5)

    def _make(self, inputs: list[Tensor], leaves: list[Any], spec: Spec, update: Update | None, key: Any) -> _Program:
        """Captures and compiles one step."""
        state, method, settings = self._state, self.method, self.settings
        _refuse_unusual(leaves, state)
        n, m = len(state.params), len(state.buffers)
        trained = [p.requires_grad for p in state.params]
        tensors = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]
        count_of = () if update is None else key[-1][1]
        made: dict[str, Any] = {}
        root = self._root
        assert root is not None

        def step(flat: list[Tensor]) -> list[Tensor]:
            params, buffers = flat[:n], flat[n : n + m]
            place = n + m + (0 if update is None else 2 * len(count_of))
            averages = flat[n + m : place]
            values = list(leaves)
            for k, x in zip(tensors, flat[place:], strict=False):
                values[k] = x
            with torch.enable_grad():
                traced = [p.detach().requires_grad_(r) for p, r in zip(params, trained, strict=True)]
                own = dict(zip([*state.params, *state.buffers], [*traced, *buffers], strict=True))
                with exchanged(root, own) as ended:
                    result = self._function(*unflatten(values, spec))
                loss = result[0] if isinstance(result, tuple) else result
                if not isinstance(loss, Tensor):
                    raise CaptureError(f"the loss must be a tensor, got {type(loss).__name__}")
                if method is not None:
                    attach(loss, [p for p in traced if p.requires_grad], method=method)
                loss.backward()
            with torch.no_grad():
                for before, now in ended.items():  # the module has put another tensor in its place
                    own[before].copy_(now)
                grads = [p.grad for p in traced]
                diagonals = [getattr(p, "hess_diag", None) for p in traced]
                owner = _Owner(flat)
                told: list[Tensor] = []
                held: set[int] = set()
                if update is not None:
                    factor = None
                    if self.max_grad_norm is not None:
                        clipped, factor = clip(
                            [g for k in update.order if (g := grads[k]) is not None], self.max_grad_norm
                        )
                        for k, g in zip(update.order, clipped, strict=True):
                            grads[k] = g
                    numbers = flat[place + len(tensors)]
                    told, made["records"] = update.captured(
                        params, grads, diagonals, averages, numbers, count_of, factor
                    )
                    if not self.keep_gradients:
                        held = update.held
                made["grads"] = [k for k, g in enumerate(grads) if g is not None and k not in held]
                made["diagonals"] = [k for k, h in enumerate(diagonals) if h is not None and k not in held]
                made["others"], others = None, []
                if isinstance(result, tuple):
                    parts, made["others"] = tree_flatten(result[1:])
                    others = [x for x in parts if isinstance(x, Tensor)]
                    made["others_values"] = [... if isinstance(x, Tensor) else x for x in parts]
                made["told"] = len(told)
                return [
                    owner.own(loss),
                    *(owner.own(grads[k], params[k]) for k in made["grads"]),
                    *(owner.own(diagonals[k], params[k]) for k in made["diagonals"]),
                    *(owner.own(x) for x in told),
                    *(owner.own(x) for x in others),
                ]

        progress = Progress(f"{self.name} ({_in_words(leaves, method)})", settings.silent)
        captured = capture(step, inputs, root)
        progress.captured(len(captured.graph.graph.nodes), settings.backend)
        run = compile_graph(captured, settings.backend, settings.options)
        progress.ready()
        return _Program(
            run=run,
            constants=captured.constants,
            grads=made["grads"],
            diagonals=made["diagonals"],
            others=made["others"],
            others_values=made.get("others_values", []),
            records=made.get("records", []),
            told=made["told"],
            refreshing=method is not None,
            autocast=key[4][0] is not None,
            changes=slice(n if update is None else 0, n + m + 2 * len(count_of)),
        )


class _Owner:
    """Gives every result memory of its own, so that what is done to one does not reach another.

    Args:
        inputs: Of the step, whose memory no result may share.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._seen: list[Tensor] = list(inputs)
        self._taken = {x.untyped_storage()._cdata for x in inputs}

    def own(self, x: Tensor, like: Tensor | None = None) -> Tensor:
        """A result, laid out like a parameter if one is given."""
        x = x.detach()
        if like is not None and x.stride() != like.stride():
            x = torch.empty_like(like, dtype=x.dtype).copy_(x)
        elif x.untyped_storage()._cdata in self._taken:
            x = x.clone()
        self._seen.append(x)  # while it lives, no other storage has its address
        self._taken.add(x.untyped_storage()._cdata)
        return x


def _refuse_unusual(leaves: Sequence[Any], state: ModuleState) -> None:
    for x in leaves:
        if isinstance(x, Tensor):
            if type(x) not in (Tensor, nn.Parameter):
                raise CaptureError(f"the batch contains a {type(x).__name__}, expected plain tensors")
            if x.requires_grad:
                raise CaptureError("a tensor of the batch requires grad, and a program gives gradients to parameters")
            if x.layout is not torch.strided:
                raise CaptureError(f"the batch contains a tensor of layout {x.layout}, expected torch.strided")
    for name, p in zip(state.param_names, state.params, strict=True):
        if p._backward_hooks:
            raise CaptureError(f"parameter {name.partition('.')[2]} has a hook (register_hook), which a program skips")


def _in_words(leaves: Sequence[Any], method: str | None) -> str:
    shapes = [f"{'x'.join(map(str, x.shape)) or 'number'}" for x in leaves if isinstance(x, Tensor)]
    return f"{method or 'gradient'}, batch of {', '.join(shapes) or 'nothing'}"


def reason_of(error: BaseException) -> str:
    """Why a step could not be captured or compiled, and where in the user's code."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    if _decides_by_entries(error):
        text = (
            "it decides by the entries of a tensor, which differ from batch to batch (if, bool(), item(), or a shape "
            "that depends on them): use torch.where, or leave it out of the step"
        )
    elif not isinstance(error, CaptureError):
        text = f"{type(error).__name__}: {text}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THE_USERS) and not frame.filename.startswith("<")
    ]
    if frames and not isinstance(error, CaptureError):
        text += f' (at {frames[-1].filename}:{frames[-1].lineno}, "{frames[-1].line}")'
    return text


def _decides_by_entries(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(
        names & {"DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode"}
    ) or "trying to get value out of a tracing tensor" in str(error)


_NOT_THE_USERS = tuple(str(Path(place).parent) for place in (torch.__file__, Path(__file__).parent))
