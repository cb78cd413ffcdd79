"""The sums of a pass over the data, which can be saved and gone on with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class HessDiagState:
    """How far a pass over the data has come: the sums so far. Pass it to :func:`hess_diag_over` to go on from there.

    Every process of a distributed run has a state of its own. A batch has entered wholly or not at all, also when the
    pass was interrupted.

    Attributes:
        batches: batches that have entered.
        samples: samples in them.

    Example:
        >>> import torch
        >>> from hesscale_lightning import HessDiagState, hess_diag_over
        >>> model, loss = torch.nn.Linear(3, 1), torch.nn.MSELoss()
        >>> data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(5)]
        >>> state = HessDiagState()
        >>> _ = hess_diag_over(model, loss, data, batches=2, state=state, progress_bar=False)
        >>> torch.save(state.state_dict(), "state.pt")                                        # doctest: +SKIP
        >>> state.load_state_dict(torch.load("state.pt"))                                     # doctest: +SKIP
        >>> h = hess_diag_over(model, loss, data, state=state, progress_bar=False)
        >>> state.batches, state.samples
        (5, 20)
    """

    def __init__(self) -> None:
        # One attribute, replaced at once, so that an interruption leaves the sums and the counts of the same batches.
        self._now: tuple[dict[str, Tensor], int, int] = ({}, 0, 0)
        self._settings: dict[str, str] = {}
        self._order: list[Tensor] = []

    @property
    def batches(self) -> int:
        """Batches that have entered."""
        return self._now[1]

    @property
    def samples(self) -> int:
        """Samples in them."""
        return self._now[2]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors, numbers and text, for ``torch.save``."""
        sums, batches, samples = self._now
        return {
            "sums": dict(sums),
            "batches": batches,
            "samples": samples,
            "settings": dict(self._settings),
            "order": list(self._order),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave; raises ValueError for anything else."""
        missing = {"sums", "batches", "samples", "settings", "order"} - set(state)
        if missing:
            raise ValueError(
                f"Found a state without {', '.join(sorted(missing))}, expected what HessDiagState.state_dict() returns."
            )
        self._settings = dict(state["settings"])
        self._order = list(state["order"])
        self._now = (dict(state["sums"]), int(state["batches"]), int(state["samples"]))

    def _begin(self, parameters: list[tuple[str, Tensor]], dtype: torch.dtype | None, settings: dict[str, str]) -> None:
        """Starts, or makes sure that what was begun was begun with the same settings and parameters."""
        shapes = {name: tuple(p.shape) for name, p in parameters}
        if not self.batches:
            self._now = (
                {
                    name: torch.zeros_like(p, dtype=dtype or torch.promote_types(p.dtype, torch.float32))
                    for name, p in parameters
                },
                0,
                0,
            )
            self._settings = settings
            return
        if self._settings != settings:
            raise ValueError(f"Found a state with {self._settings}, expected {settings}: go on as it was begun.")
        found = {name: tuple(h.shape) for name, h in self._now[0].items()}
        if found != shapes:
            differing = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
            raise ValueError(
                f"Found a state of {len(found)} parameters that differs from the model's {len(shapes)} in "
                f"{', '.join(differing[:3])}: pass the state of this model, or a new one."
            )
        sums, batches, samples = self._now
        device = {name: p.device for name, p in parameters}
        self._now = ({name: h.to(device[name]) for name, h in sums.items()}, batches, samples)

    def _add(self, names: Sequence[str], diagonals: Sequence[Tensor | None], weight: int, size: int) -> None:
        sums, batches, samples = self._now
        after = {
            name: sums[name] if h is None else sums[name].add(h.to(sums[name].dtype), alpha=weight)
            for name, h in zip(names, diagonals, strict=True)
        }
        self._now = (after, batches + 1, samples + size)
