"""Gets hold of a Stable-Baselines3 algorithm's loss on its way to ``backward()``, without touching the algorithm.

An algorithm's ``train()`` asks its policy for outputs, computes a loss from them, and calls ``loss.backward()``: no
method of the policy comes between. So the policy *tags* one output: it makes the tensor an instance of a thin subclass,
whose results are tagged as well and whose ``backward`` lets the seam attach first. Nothing is patched, values and graph
are the very same, and a loss that no optimizer wants curvature of goes through as if there were no tag.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hesscale_lightning.curvature.engine import Method, attach
from sb3_integration.curvature_statistics import CurvatureStatistics

_DisableTags = torch._C.DisableTorchFunctionSubclass


class _TaggedTensor(Tensor):
    """A tensor on the way to a loss. Every seam has a subclass of its own, so that results need no search for it."""

    _seam: weakref.ref[LossSeam]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _DisableTags():
            result = func(*args, **(kwargs or {}))
            if type(result) is Tensor:
                if result.requires_grad:
                    result.__class__ = cls
            elif isinstance(result, (tuple, list)):
                for part in result:
                    if type(part) is Tensor and part.requires_grad:
                        part.__class__ = cls
        return result

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """``Tensor.backward``, with curvature for the optimizers that wait for it."""
        seam = self._seam()
        self.__class__ = Tensor  # type: ignore[assignment]  # the loss has arrived; what is logged of it needs no tag
        with _DisableTags():
            armed = seam.attach(self) if seam is not None else None
            try:
                self.backward(*args, **kwargs)
            finally:
                if armed is not None:
                    armed.remove()

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _DisableTags():
            return torch.Tensor.__reduce_ex__(self.detach(), protocol)


class LossSeam:
    """Attaches curvature to the losses of one policy.

    Args:
        policy: The policy. Its optimizers, and those of its networks, are looked up at every backward, so that they can
            be exchanged at any time.
        method: As for :func:`hesscale_lightning.attach`.
    """

    def __init__(self, policy: nn.Module, method: Method) -> None:
        self.policy = policy
        self.method = method
        self.statistics = CurvatureStatistics()
        self._tagged: type[_TaggedTensor] | None = None
        self._tagging = True

    def __getstate__(self) -> dict[str, Any]:
        return {"policy": self.policy, "method": self.method}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def tag(self, output: Any) -> Any:
        """Tags an output of the policy's networks, in place; what does not require grad stays as it is."""
        if self._tagging and type(output) is Tensor and output.requires_grad:
            if self._tagged is None:
                self._tagged = type("TaggedTensor", (_TaggedTensor,), {"_seam": weakref.ref(self)})
            output.__class__ = self._tagged
        return output

    @contextmanager
    def without_tags(self) -> Iterator[None]:
        """Tags nothing, where somebody else attaches the loss."""
        before, self._tagging = self._tagging, False
        try:
            yield
        finally:
            self._tagging = before

    def attach(self, loss: Tensor) -> Any:
        """Arms the loss for the optimizers between ``zero_grad()`` and ``step()``; None if there are none."""
        waiting = [o for o in optimizers_of(self.policy) if getattr(o, "awaits_diagonals", False)]
        if not waiting:
            return None
        return attach(
            loss, [p for o in waiting for group in o.param_groups for p in group["params"]], method=self.method
        )

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Lets optimizers that use diagonals fail with advice if the loss does not come through here."""
        for optimizer in optimizers:
            if hasattr(optimizer, "awaits_diagonals"):
                optimizer.register_step_pre_hook(self._before_step)
                optimizer.register_step_post_hook(self._after_step)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            return  # a closure, which has yet to compute gradients; the first argument is the optimizer
        for group in optimizer.param_groups:
            for k, param in enumerate(group["params"]):
                if param.grad is not None and getattr(param, "hess_diag", None) is None:
                    raise self._no_curvature(optimizer, group["param_names"][k] if "param_names" in group else str(k))
        self.statistics.take(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.statistics.take_what_was_done(optimizer)

    # By a program, which gives every diagonal itself, and runs no step that is looked at.
    _before_step.may_be_skipped = _after_step.may_be_skipped = True  # type: ignore[attr-defined]

    def _no_curvature(self, optimizer: Optimizer, name: str) -> RuntimeError:
        return RuntimeError(
            f"{type(optimizer).__name__} is about to step without curvature: the gradient of parameter {name} comes "
            f"from a loss that was not computed from an output that {type(self.policy).__name__} has tagged. If you "
            "override evaluate_actions(), predict_values() or a network's forward(), return what super() returned, do "
            "not detach() it or rebuild it from numpy. If you wrote the training loop, compute one loss from that "
            "output, and call the optimizer's own zero_grad() and then loss.backward(), not torch.autograd.grad(); "
            "any other tensor on the way to a loss may be given to policy.seam.tag(). To train without curvature pass "
            "policy_kwargs=dict(optimizer_class=torch.optim.Adam)."
        )


class OutputTag:
    """A forward hook that tags a network's output. An object, not a closure, so that the network can be pickled."""

    def __init__(self, seam: LossSeam) -> None:
        self.seam = seam

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Returns the output, tagged."""
        return self.seam.tag(output)


def optimizers_of(policy: nn.Module) -> Iterator[Optimizer]:
    """The optimizers that Stable-Baselines3 keeps on a policy or on its networks."""
    for module in (policy, *policy.children()):
        optimizer = module.__dict__.get("optimizer")
        if optimizer is not None:
            yield optimizer
