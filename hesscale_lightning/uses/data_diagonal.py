"""The diagonal over a data set: one pass, one backward per batch, and a model that is afterwards what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import islice
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hesscale_lightning.curvature import backward, exact_hess_diag
from hesscale_lightning.curvature.engine import METHODS, Method
from hesscale_lightning.trainer.eager import has_compiled_code
from hesscale_lightning.uses.batch_losses import batch_losses, size_of
from hesscale_lightning.uses.hess_diag_state import HessDiagState
from hesscale_lightning.uses.untouched import clear, global_random_states, set_global_random_states, untouched

Reduction = Literal["mean", "sum"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
_DTYPES = (None, torch.float32, torch.float64)


def hess_diag_over(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    data: Any,
    *,
    method: Method | Literal["exact"] = "hesscale",
    reduction: Reduction = "mean",
    loss_reduction: Reduction = "mean",
    step: Callable[[nn.Module, Any], Tensor] | None = None,
    batches: int | None = None,
    batch_size: Callable[[Any], int] | None = None,
    dtype: torch.dtype | None = None,
    training: bool = False,
    state: HessDiagState | None = None,
    distributed: bool | None = None,
    progress_bar: bool = True,
) -> dict[str, Tensor]:
    r"""The diagonal of the Hessian of a model's loss over a data set, by one backward pass for each batch.

    With the diagonal :math:`h_b` of the mean loss of batch :math:`b`, which has :math:`n_b` samples,

    .. math:: h = \sum_b n_b h_b \Big/ \sum_b n_b \quad\text{(mean)}, \qquad h = \sum_b n_b h_b \quad\text{(sum)}.

    The model is afterwards what it was, also after an exception or Ctrl-C: gradients, ``p.hess_diag``, buffers, random
    numbers, the mode of every module. What had entered by then is in ``state``; the same call goes on from there.

    Args:
        model: The network, or a LightningModule. Under ``DistributedDataParallel``, the module inside is used. Compiled
            code is run eagerly.
        loss_fn: Called as ``loss_fn(model(x), y)`` for batches ``(x, y)``; for any other loss see ``step``. None takes
            the ``training_step`` of a LightningModule, which logs nothing meanwhile.
        data: Batches, such as a ``DataLoader``'s. A LightningDataModule gives its training batches, and None asks the
            LightningModule for them. Batches are moved to the model's device.
        method: As for :func:`hesscale_lightning.attach`; ``"hesscale_gn"`` is nowhere negative for the losses of
            PyTorch. ``"exact"`` is the dense reference, for small networks.
        reduction: ``"mean"`` over the samples, or ``"sum"``.
        loss_reduction: What the loss itself does over the samples of a batch. A mean over anything else, such as
            weights of classes or tokens that are not ignored, is none over samples: let the loss sum and say ``"sum"``.
        step: Called as ``step(model, batch)``, returns the loss; in place of ``loss_fn``.
        batches: How many batches to take at most, in this call. None takes all.
        batch_size: Called on a batch, returns its number of samples. None takes the first dimension of its tensors.
        dtype: Of the sums and of the result, ``torch.float32`` or ``torch.float64``. None takes the parameter's, and
            float32 for half precision.
        training: Whether the model is in training mode meanwhile, with dropout and batch statistics.
        state: The sums of an earlier call, to go on from; they are updated as batches enter. The batches that it has
            seen are skipped, in the order of the first call, also with a shuffling ``DataLoader``.
        distributed: Whether to add the sums of all processes, each of which must call this with its own part of the
            data. None does if ``torch.distributed`` is initialised. The result is the same in all processes.
        progress_bar: Whether to show one (in the first process).

    Returns:
        For every parameter that requires grad, by its name, a tensor of its shape; zeros where no loss reached it.

    Raises:
        UnsupportedOperationError: An operation between the loss and a parameter has no rule.
        TypeError, ValueError: An argument is wrong, there is no batch, the sizes of batches are not clear, or the state
            belongs to another call. Raised before anything has changed.

    Example:
        >>> import torch
        >>> from hesscale_lightning import hess_diag_over
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 2.0]])
        >>> data = [(x[:2], torch.zeros(2, 1)), (x[2:], torch.zeros(1, 1))]
        >>> hess_diag_over(model, torch.nn.MSELoss(), data, progress_bar=False)  # 2 E[x^2], of all samples alike
        {'weight': tensor([[9.3333, 3.3333]])}
    """
    _check(method, reduction, loss_reduction, batches, dtype)
    source = batch_losses(model, loss_fn, data, step)
    model = source.model
    state = HessDiagState() if state is None else state
    settings = {
        "method": method,
        "loss_reduction": loss_reduction,
        "dtype": str(dtype),
        "training": str(training),
    }
    together = (dist.is_available() and dist.is_initialized()) if distributed is None else distributed
    with source.context(), _eager(model), untouched(model, training) as parameters:
        parameters = [(name.replace("_orig_mod.", ""), p) for name, p in parameters]
        if not parameters:
            raise ValueError("Found no parameter that requires grad, expected at least one to compute curvature for.")
        sharded = [name for name, p in parameters if hasattr(p, "device_mesh")]
        if sharded:
            raise ValueError(
                f"Found parameters spread over processes ({', '.join(sharded[:3])}), expected whole ones: call this "
                "before fully_shard, or attach in a loop of your own, which works with it."
            )
        if state.batches and getattr(source.loader, "persistent_workers", False):
            raise ValueError(
                "Found persistent_workers=True, with which a DataLoader shuffles otherwise when it is iterated again, "
                "expected False to go on from a state."
            )
        state._begin(parameters, dtype, settings)
        with _order_of(source.loader, state):
            taken = islice(source.loader, state.batches, None if batches is None else state.batches + batches)
            for batch in _shown(taken, source.loader, state.batches, batches, progress_bar):
                size = (batch_size or size_of)(batch)
                loss = source.loss(batch, state.batches)
                diagonals = _diagonals(loss, [p for _, p in parameters], method)
                state._add([name for name, _ in parameters], diagonals, size if loss_reduction == "mean" else 1, size)
                del loss, diagonals
    return _result(state, reduction, together)


def _check(method: str, reduction: str, loss_reduction: str, batches: int | None, dtype: torch.dtype | None) -> None:
    if method not in (*METHODS, "exact"):
        raise ValueError(f"Found method={method!r}, expected one of {', '.join((*METHODS, 'exact'))}.")
    for name, value in (("reduction", reduction), ("loss_reduction", loss_reduction)):
        if value not in REDUCTIONS:
            raise ValueError(f"Found {name}={value!r}, expected 'mean' or 'sum'.")
    if batches is not None and batches < 1:
        raise ValueError(f"Found batches={batches}, expected at least 1, or None for all.")
    if dtype not in _DTYPES:
        raise ValueError(f"Found dtype={dtype}, expected torch.float32, torch.float64 or None.")


def _diagonals(loss: Tensor, parameters: list[Tensor], method: Method | Literal["exact"]) -> list[Tensor | None]:
    """The diagonal of one loss; no gradient and no diagonal stays on a parameter."""
    if method == "exact":
        return list(exact_hess_diag(loss, parameters))
    clear(parameters)
    backward(loss, parameters, method=method, inputs=parameters)  # what else requires grad is left alone
    diagonals = [getattr(p, "hess_diag", None) for p in parameters]
    clear(parameters)
    return diagonals


def _result(state: HessDiagState, reduction: str, together: bool) -> dict[str, Tensor]:
    sums, _, samples = state._now
    if together:
        sums, samples = _added_up(sums, samples)
    if not samples:
        raise ValueError("Found no training batch, expected at least one to compute curvature from.")
    return {name: h / samples if reduction == "mean" else h.clone() for name, h in sums.items()}


def _added_up(sums: Mapping[str, Tensor], samples: int) -> tuple[dict[str, Tensor], int]:
    """The sums of all processes, in one call for each kind of tensor."""
    result: dict[str, Tensor] = {}
    kinds = sorted({(str(h.dtype), str(h.device)) for h in sums.values()})
    for kind in kinds:
        some = {name: h for name, h in sums.items() if (str(h.dtype), str(h.device)) == kind}
        flat = torch.cat([h.reshape(-1) for h in some.values()])
        dist.all_reduce(flat)
        for (name, h), part in zip(some.items(), flat.split([h.numel() for h in some.values()]), strict=True):
            result[name] = part.view_as(h)
    count = torch.tensor([samples], dtype=torch.int64, device=next(iter(sums.values())).device)
    dist.all_reduce(count)
    return {name: result[name] for name in sums}, int(count)


def _shown(taken: Iterator[Any], loader: Iterable[Any], before: int, batches: int | None, progress_bar: bool) -> Any:
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    if not (progress_bar and first):
        return taken
    from tqdm.auto import tqdm

    limits = [] if batches is None else [before + batches]
    if isinstance(loader, Sized):
        with suppress(TypeError):  # a DataLoader of an IterableDataset has no length, and says so when asked
            limits.append(len(loader))
    total = min(limits, default=None)
    return tqdm(taken, desc="Hessian diagonal", unit="batch", total=total, initial=before, leave=False)


class _order_of:
    """Draws the order of the batches as the first call did, and leaves a loader's generators as they were."""

    def __init__(self, loader: Iterable[Any], state: HessDiagState) -> None:
        owners = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))]
        owners.append(getattr(owners[-1], "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        unique = {id(g): g for g in found if isinstance(g, torch.Generator)}
        self._generators = list(unique.values())
        self._state = state

    def __enter__(self) -> None:
        self._before = [g.get_state() for g in self._generators]
        order = [torch.get_rng_state(), *global_random_states(), *self._before]
        if self._state._order and len(self._state._order) == len(order):
            numbers = [state.cpu() for state in self._state._order]
            torch.set_rng_state(numbers[0])
            set_global_random_states(numbers[1], numbers[2])
            for generator, state in zip(self._generators, numbers[3:], strict=True):
                generator.set_state(state)
        else:
            self._state._order = order

    def __exit__(self, *_: object) -> None:
        for generator, numbers in zip(self._generators, self._before, strict=True):
            generator.set_state(numbers)


def _eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Runs compiled code eagerly: a compiled network is one opaque operation."""
    return torch.compiler.set_stance("force_eager") if has_compiled_code(model) else nullcontext()
