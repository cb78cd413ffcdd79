r"""Optimal Brain Damage as a callback: prunes what the loss misses least, by :math:`\frac12 h w^2`."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import prune

from hesscale_lightning.curvature.engine import METHODS, Method
from hesscale_lightning.uses.data_diagonal import hess_diag_over
from hesscale_lightning.uses.masks import LowestImportance, lowest, mask_of, order_kept, original

# By name: importing the strategies is slow.
_SPLITTING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")
Places = Sequence[tuple[nn.Module, str]]


class HesScalePruning(ModelPruning):
    r"""Prunes the weights whose removal costs the least loss by the quadratic model, in the manner of ModelPruning.

    At a minimum, removing the weight :math:`w_i` raises the loss by

    .. math:: s_i = \tfrac12 h_i w_i^2 + \text{(third and higher order, and the off-diagonal Hessian)}

    with the Hessian's diagonal :math:`h`, which :func:`hesscale_lightning.hess_diag_over` computes of the training
    loss, in evaluation mode, before weights are pruned. Training goes on with a mask. This is one of Lightning's
    ``ModelPruning``: its arguments have the same names and meaning, the pruned parameter ``weight`` becomes
    ``weight_orig`` and ``weight_mask``, and an amount counts what is not pruned yet. In a distributed run, all
    processes have the same masks.

    Args:
        amount: How much of what is left to prune each time: a fraction, a number of entries (of units, if structured),
            or a function of the epoch that returns one, such as a :class:`SparsitySchedule`.
        method: As for :func:`hesscale_lightning.attach`. What is below 0 counts as 0.
        batches: How many training batches the diagonal is the mean of; None takes all.
        parameters_to_prune: Pairs of a module and the name of its parameter; empty takes all weights and biases.
        parameter_names: Names of the parameters to take if no pairs are given: ``weight``, ``bias`` or both.
        use_global_unstructured: Whether all parameters are ranked together, or each by itself.
        pruning_dim: None prunes single entries. A dimension prunes units, the slices along it (0: the neurons of a
            linear layer, the output channels of a convolution), each layer by itself: a unit costs the sum over its
            weights, and over its bias, which is pruned with it. Needs ``parameters_to_prune``, since no output of the
            network may be pruned.
        apply_pruning: Whether to prune, or a function of the epoch that tells.
        make_pruning_permanent: Whether masks are applied for good when training ends, and in checkpoints. Otherwise
            they stay, beside the parameters as they were. A run that is resumed has its masks either way.
        use_lottery_ticket_hypothesis: Whether what is left returns to its value before training after each pruning.
        resample_parameters: Whether it is drawn anew instead.
        verbose: 1 prints the sparsity reached, 2 that of every parameter as well.
        prune_on_train_epoch_end: Whether to prune when a training epoch ends, or a validation epoch.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: If ModelPruning refuses an argument, or a strategy splits parameters.

    Example:
        >>> import lightning.pytorch as pl
        >>> from hesscale_lightning import HesScalePruning, SparsitySchedule
        >>> pruning = HesScalePruning(SparsitySchedule(0.9, begin_epoch=10, end_epoch=30))
        >>> trainer = pl.Trainer(max_epochs=40, callbacks=[pruning], logger=False)            # doctest: +SKIP

    Source: LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989, equation 5.
    """

    def __init__(
        self,
        amount: float | int | Callable[[int], float | int] = 0.5,
        method: Method = "hesscale",
        batches: int | None = None,
        parameters_to_prune: Places = (),
        parameter_names: list[str] | None = None,
        use_global_unstructured: bool = True,
        pruning_dim: int | None = None,
        apply_pruning: bool | Callable[[int], bool] = True,
        make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: bool | Callable[[int], bool] = False,
        resample_parameters: bool = False,
        verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"Found method={method!r}, expected one of {', '.join(METHODS)}.")
        if batches is not None and batches < 1:
            raise ValueError(f"Found batches={batches}, expected at least 1, or None for all.")
        if isinstance(amount, float) and not 0 <= amount <= 1:
            raise ValueError(f"Found amount={amount}, expected a fraction from 0 to 1, or a whole number of entries.")
        if isinstance(amount, int) and amount < 0:
            raise ValueError(f"Found amount={amount}, expected at least 0.")
        if pruning_dim is not None and not parameters_to_prune:
            raise ValueError(
                f"Found pruning_dim={pruning_dim} without parameters_to_prune, which would prune the network's "
                "outputs: give the layers whose units may go, such as [(net[0], 'weight')]."
            )
        super().__init__(
            pruning_fn=LowestImportance,
            parameters_to_prune=parameters_to_prune,
            parameter_names=parameter_names,
            amount=amount,
            apply_pruning=apply_pruning,
            make_pruning_permanent=make_pruning_permanent,
            use_lottery_ticket_hypothesis=use_lottery_ticket_hypothesis,
            resample_parameters=resample_parameters,
            verbose=verbose,
            prune_on_train_epoch_end=prune_on_train_epoch_end,
        )
        self.method = method
        self.batches = batches
        self.global_ranking = use_global_unstructured
        self.pruning_dim = pruning_dim
        self.verbose = verbose
        self.places: Places = ()
        self._fitted: tuple[pl.Trainer, pl.LightningModule] | None = None
        self._hook: Any = None
        self._masks: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the parameters to prune, as ModelPruning does; raises for a strategy that splits them."""
        found = {cls.__name__ for cls in type(trainer.strategy).__mro__}.intersection(_SPLITTING)
        if found:
            raise MisconfigurationException(
                f"HesScalePruning found the strategy {type(trainer.strategy).__name__}, which splits parameters "
                "between processes; masks need whole parameters. Use strategy='ddp' or a single device."
            )
        super().setup(trainer, pl_module, stage)
        self.places = self._parameters_to_prune
        self._fitted = (trainer, pl_module)
        self._hook = pl_module.register_load_state_dict_pre_hook(self._expect_masks)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets go of the trainer and the module."""
        self._fitted = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Applies the masks for good, if they are to be permanent, and keeps them for a run that goes on from here."""
        self._masks = self._found_masks()
        super().on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The masks, which a checkpoint with permanent pruning does not hold beside the weights."""
        return {"masks": self._found_masks() or self._masks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts the masks of a checkpoint in place, once its weights are loaded."""
        self._masks = dict(state_dict["masks"])
        for name, place in self._named_places().items():
            if name in self._masks and not hasattr(place[0], f"{place[1]}_mask"):
                with order_kept(*place):
                    prune.custom_from_mask(*place, self._masks[name].to(original(*place).device))

    def _named_places(self) -> dict[str, tuple[nn.Module, str]]:
        if self._fitted is None:
            return {}
        paths = {module: path for path, module in self._fitted[1].named_modules()}
        candidates = [*self.places, *((owner, "bias") for owner, _ in self.places if _has_bias(owner))]
        return {f"{paths[owner]}.{name}": (owner, name) for owner, name in candidates}

    def _found_masks(self) -> dict[str, Tensor]:
        """The masks that are there, by the name of the parameter."""
        places = self._named_places().items()
        return {name: mask_of(*place).clone() for name, place in places if hasattr(place[0], f"{place[1]}_mask")}

    def _expect_masks(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before weights with masks beside them are loaded: makes room for the masks."""
        for name, place in self._named_places().items():
            if f"{prefix}{name}_mask" in state_dict and not hasattr(place[0], f"{place[1]}_mask"):
                with order_kept(*place):
                    prune.identity(*place)

    def importance(self, places: Places) -> dict[tuple[nn.Module, str], Tensor]:
        """The cost of removing each entry of some parameters; override it to rank by something else."""
        assert self._fitted is not None, "called outside of a fit"
        trainer, module = self._fitted
        diagonals = hess_diag_over(
            module, None, _batches(trainer), method=self.method, batches=self._limit(trainer), progress_bar=False
        )
        names = {id(p): name.replace("_orig_mod.", "") for name, p in module.named_parameters()}
        result = {}
        for owner, name in places:
            parameter = original(owner, name)
            h = diagonals.get(names[id(parameter)])
            if h is None:
                raise ValueError(
                    f"Found {names[id(parameter)]}, which does not require grad and has no curvature, among the "
                    "parameters to prune; expected trainable ones: leave it out of parameters_to_prune."
                )
            result[owner, name] = h.clamp(min=0) * parameter.detach().to(h.dtype).square() / 2
        return result

    def _limit(self, trainer: pl.Trainer) -> int | None:
        limits = [limit for limit in (self.batches, trainer.num_training_batches) if limit is not None]
        least = min(limits)
        return None if least == float("inf") else int(least)

    def apply_pruning(self, amount: int | float) -> None:
        """Prunes an amount of what is left."""
        with torch.inference_mode(False), torch.no_grad():
            if self.pruning_dim is not None:
                self._prune_units(amount, self.pruning_dim)
            else:
                importance = self.importance(self.places)
                if self.global_ranking:
                    prune.global_unstructured(
                        self.places, LowestImportance, importance_scores=importance, amount=amount
                    )
                else:
                    for owner, name in self.places:
                        LowestImportance.apply(owner, name, importance_scores=importance[owner, name], amount=amount)
        if self.verbose:
            self._report()

    def _prune_units(self, amount: int | float, dim: int) -> None:
        for owner, name in self.places:
            shape = tuple(original(owner, name).shape)
            if len(shape) < 2 or not 0 <= dim < len(shape):
                raise ValueError(
                    f"Found {type(owner).__name__}.{name} of shape {shape} for pruning_dim={dim}, expected a parameter "
                    "of at least two dimensions that has it: give weights in parameters_to_prune."
                )
        with_bias = {owner for owner, name in self.places if dim == 0 and name == "weight" and _has_bias(owner)}
        importance = self.importance([*self.places, *((owner, "bias") for owner in with_bias)])
        for owner, name in self.places:
            cost = importance[owner, name]
            others = [d for d in range(cost.ndim) if d != dim]
            units = cost.sum(others)
            if owner in with_bias:
                units = units + importance[owner, "bias"]
            keep = mask_of(owner, name).amax(others).bool()
            left = keep.nonzero().flatten()
            keep[left[lowest(units[left], amount)]] = False
            broadcast = keep.view([-1 if d == dim else 1 for d in range(cost.ndim)])
            prune.custom_from_mask(owner, name, broadcast.expand_as(cost))
            if owner in with_bias:
                prune.custom_from_mask(owner, "bias", keep)

    def _report(self) -> None:
        counts = [(name, type(owner).__name__, mask_of(owner, name)) for owner, name in self.places]
        pruned, total = sum(int((m == 0).sum()) for *_, m in counts), sum(m.numel() for *_, m in counts)
        rank_zero_info(f"HesScalePruning: {pruned} of {total} entries pruned ({pruned / total:.2%})")
        if self.verbose == 2:
            for name, kind, mask in counts:
                zeros = int((mask == 0).sum())
                rank_zero_info(f"  {kind}.{name}: {zeros} of {mask.numel()} ({zeros / mask.numel():.2%})")


def _has_bias(owner: nn.Module) -> bool:
    return getattr(owner, "bias_orig", getattr(owner, "bias", None)) is not None


def _batches(trainer: pl.Trainer) -> Any:
    """The training batches of a trainer, from one loader or a collection of several."""
    loaders = trainer.train_dataloader
    if isinstance(loaders, list | tuple | dict):
        return (batch for batch, _, _ in CombinedLoader(loaders, "max_size_cycle"))
    return loaders
