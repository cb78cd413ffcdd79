"""What the compiled algorithms have in common: the update of a minibatch as a program, curvature where it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn
from torch.optim import Optimizer

from hesscale_lightning.compiled_step import Settings, Step


class CompiledUpdates(BaseAlgorithm):
    """Keeps the programs of an algorithm's updates.

    Attributes:
        compile_step_options: Arguments of :func:`hesscale_lightning.compile_step`: ``backend``, ``on_failure``,
            ``short_batch``, ``max_programs``, ``options`` and ``silent``.
    """

    compile_step_options: ClassVar[dict[str, Any]] = {}
    _steps: dict[str, Step] | None = None

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_steps"]

    def _step(
        self,
        name: str,
        modules: Sequence[nn.Module],
        function: Callable[..., Any],
        optimizer: Optimizer,
        *,
        updates: bool = True,
        max_grad_norm: float | None = None,
    ) -> Step:
        """The step of that name, for the modules and the optimizer that the policy has now.

        Args:
            name: What it is called in messages.
            modules: All modules that the function uses.
            function: Maps a batch to the loss and further results.
            optimizer: Of the parameters that are to move.
            updates: Whether the optimizer steps in it; else it computes gradients alone.
            max_grad_norm: As for :func:`hesscale_lightning.compile_step`.
        """
        if self._steps is None:
            self._steps = {}
        step = self._steps.get(name)
        if step is None or any(a is not b for a, b in zip(step.modules, modules, strict=True)):
            step = self._steps[name] = Step(
                modules,
                function,
                method=None,
                optimizer=optimizer if updates else None,
                max_grad_norm=max_grad_norm if updates else None,
                settings=Settings(**self.compile_step_options),
                name=f"{name} of {type(self).__name__}",
            )
        seam = getattr(self.policy, "seam", None)
        step.method = seam.method if seam is not None and hasattr(optimizer, "awaits_diagonals") else None
        if updates:
            step.optimizer, step.max_grad_norm = optimizer, max_grad_norm
        return step

    def _run(self, step: Step, *batch: Any) -> Any:
        """Makes the step, eagerly if somebody looks at its diagonals; returns what goes with the loss, or the loss."""
        seam = getattr(self.policy, "seam", None)
        looked_at = step.method is not None and seam is not None and seam.statistics.awaits(step.optimizer)
        result = step.eagerly(*batch) if looked_at else step(*batch)
        return result[1] if isinstance(result, tuple) else result

    def _without_tags(self) -> AbstractContextManager[None]:
        """In which outputs are not tagged, because the step itself attaches to the loss."""
        seam = getattr(self.policy, "seam", None)
        return nullcontext() if seam is None else seam.without_tags()
