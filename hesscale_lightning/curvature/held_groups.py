"""Groups of whole parameters that stay gathered until a backward pass has ended, and the reduction of diagonals.

FSDP2 gathers, frees and reduces parameters in groups. Diagonals go the way of the gradients: where those are reduced in
this backward pass, each group's diagonals are averaged over the processes and cut into shards by one reduce-scatter;
where FSDP2 accumulates whole gradients, whole diagonals are accumulated beside them (``hess_diag`` of the whole
parameter), and reduced with the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.tensor_parallel import is_distributed

#: FSDP2's record of a parameter, and of its group.
Member = tuple[Any, Any]


class Held:
    """Keeps groups gathered for one backward pass.

    Args:
        members: The sharded parameters that get a diagonal, in one order in all processes.
        elsewhere: ``id`` of the records of those that are in the graphs of other processes only.
        groups: All that the graph may refer to, those of frozen parameters as well.
    """

    def __init__(self, members: Sequence[Member], elsewhere: set[int], groups: list[Any]) -> None:
        self._members = members
        self._by_whole = {id(whole): (part, group) for part, group in members if (whole := _whole(part)) is not None}
        self._elsewhere = elsewhere
        self._groups = groups
        self._frees: list[bool] = []  # whether FSDP2 frees each group in backward, once that has begun
        self._arrived: dict[int, tuple[Tensor | None, bool]] = {}  # by the record's id
        self._gather()

    def _gather(self) -> None:
        for group in self._groups:
            group.unshard()
            group.wait_for_unshard()

    def begin(self) -> None:
        """Gathers again what another forward or backward pass has freed since, and keeps it from being freed."""
        self._gather()
        self._frees = [group.reshard_after_backward for group in self._groups]
        for group in self._groups:
            group.reshard_after_backward = False
        for part, group in self._members:
            fresh, whole = _is_fresh(part, group), _whole(part)
            if fresh and getattr(whole, "hess_diag", None) is not None:  # of a pass that was given up
                whole.hess_diag = None
            if id(part) in self._elsewhere:
                self._arrived[id(part)] = None, fresh

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Hands the groups back to FSDP2, which frees those that have yet to pass backward's end itself."""
        for group, frees in zip(self._groups, self._frees, strict=False):
            group.reshard_after_backward = frees
        for group in self._groups:
            if group.reshard_after_backward and group._training_state.name != "PRE_BACKWARD":
                group.reshard()
        self._groups = []

    def fresh(self, leaf: Tensor) -> bool:
        """Whether the gradient of a leaf starts anew."""
        member = self._by_whole.get(id(leaf))
        return leaf.grad is None if member is None else _is_fresh(*member)

    def takes(self, leaf: Tensor, h: Tensor | None, fresh: bool) -> bool:
        """Keeps what arrived at a whole parameter for :meth:`scatter`; False for any other leaf."""
        member = self._by_whole.get(id(leaf))
        if member is None:
            return False
        if h is not None and h.shape != leaf.shape:
            raise RuntimeError(f"curvature of shape {tuple(h.shape)} arrived at a tensor of shape {tuple(leaf.shape)}")
        self._arrived[id(member[0])] = h, fresh
        return True

    def scatter(self) -> None:
        """Averages what arrived over the processes, and adds each process's part to its shard's ``hess_diag``."""
        by_group: dict[int, list[tuple[Member, Tensor, bool]]] = {}
        for part, group in self._members:
            whole = _whole(part)
            waiting = getattr(whole, "hess_diag", None)
            if id(part) not in self._arrived and waiting is None:
                continue
            h, fresh = self._arrived.pop(id(part), (None, False))
            total = _summed(part, h, waiting, group.device)
            if _reduces(group):
                if whole is not None:
                    whole.hess_diag = None
                by_group.setdefault(id(group), []).append(((part, group), total, fresh))
                continue
            whole.hess_diag = total
            if fresh:
                part.sharded_param.hess_diag = None
        for entries in by_group.values():
            _scatter([(part, total) for (part, _), total, _ in entries], [fresh for _, _, fresh in entries])


def _whole(part: Any) -> Any:
    """The whole parameter, the same object in all steps; None before its module's first forward pass."""
    return getattr(part, "_unsharded_param", None)


def _is_fresh(part: Any, group: Any) -> bool:
    """Whether no gradient of this parameter waits anywhere."""
    return (
        part.sharded_param.grad is None
        and part.unsharded_accumulated_grad is None
        and getattr(_whole(part), "grad", None) is None
        and getattr(group, "_partial_reduce_output", None) is None
    )


def _reduces(group: Any) -> bool:
    """Whether shards get their gradients in this backward pass."""
    return bool(
        group.reduce_grads and (group.all_reduce_grads or not hasattr(group.mesh_info, "replicate_process_group"))
    )


def _summed(part: Any, h: Any, waiting: Tensor | None, device: torch.device) -> Tensor:
    """This process's diagonal of a whole parameter, with what waits from earlier passes, in the shard's dtype."""
    shard, leaf = part.sharded_param, _whole(part)
    dtype = torch.float32 if shard.dtype in HALF else shard.dtype
    if is_distributed(leaf) and h is not None:  # inside tensor parallelism: the part that this process trains
        h = h.redistribute(placements=leaf.placements).to_local()
    if h is None:
        return torch.zeros(part._orig_size, dtype=dtype, device=device) if waiting is None else waiting
    arrived: Tensor = h.to(dtype)
    return arrived if waiting is None else waiting + arrived


def _scatter(entries: Sequence[tuple[Any, Tensor]], fresh: Sequence[bool]) -> None:
    """One reduce-scatter of the diagonals of one group."""
    info = entries[0][0].mesh_info
    pieces = getattr(info, "shard_mesh_size", 1)
    rows = [_rows(total, part.fsdp_placement.dim, pieces) for part, total in entries]
    flat = torch.cat(rows, 1)
    mine = flat.new_empty(flat.shape[1])
    copies = pieces
    if pieces > 1:
        dist.reduce_scatter_single(mine, flat.view(-1), group=info.shard_process_group)
    else:
        mine = flat.view(-1)
    if hasattr(info, "replicate_process_group"):
        dist.all_reduce(mine, group=info.replicate_process_group)
        copies *= info.replicate_mesh_size
    mine /= copies
    for (part, _), row, anew in zip(entries, mine.split([row.shape[1] for row in rows]), fresh, strict=True):
        shard = part.sharded_param
        h = _shard_of(row, shard, part.fsdp_placement.dim)
        earlier = None if anew else getattr(shard, "hess_diag", None)
        shard.hess_diag = h if earlier is None else earlier + h


def _rows(total: Tensor, dim: int, pieces: int) -> Tensor:
    """A tensor cut along ``dim`` as FSDP2 cuts it: a row for each process, filled up with zeros."""
    turned = total.movedim(dim, 0) if total.dim() else total.reshape(1)
    length = -(-turned.shape[0] // pieces)
    missing = length * pieces - turned.shape[0]
    if missing:
        turned = torch.cat([turned, turned.new_zeros(missing, *turned.shape[1:])])
    return turned.reshape(pieces, -1)


def _shard_of(row: Tensor, shard: Any, dim: int) -> Tensor:
    """A process's row as a DTensor that is spread as a sharded parameter is."""
    from torch.distributed.tensor import DTensor

    local = shard.to_local()
    turned = local.movedim(dim, 0).shape
    entries = row[: local.numel()].view(turned).movedim(0, dim)
    mine = torch.empty_like(local, dtype=row.dtype).copy_(entries)
    return DTensor.from_local(
        mine, shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
    )


def missing_members(members: Sequence[Member], reached: Mapping[int, Any]) -> set[int]:
    """Which parameters are in the graphs of other processes and not in this one's, by the ``id`` of their records.

    The processes tell each other, by one number for each parameter.

    Args:
        members: In one order in all processes.
        reached: By the ``id`` of a whole parameter, those in this process's graph.

    Raises:
        RuntimeError: In every process, if there are some whose gradients FSDP2 would not reduce either.
    """
    meshes: dict[int, list[Member]] = {}
    for part, group in members:
        meshes.setdefault(id(group.mesh_info.mesh), []).append((part, group))
    elsewhere: set[int] = set()
    uneven: list[str] = []
    for ours in meshes.values():
        info = ours[0][1].mesh_info
        here = [id(_whole(part)) in reached for part, _ in ours]
        counts = torch.tensor(here, dtype=torch.int32, device=ours[0][1].device)
        processes = 1
        for name in ("shard", "replicate"):
            if hasattr(info, f"{name}_process_group"):
                dist.all_reduce(counts, group=getattr(info, f"{name}_process_group"))
                processes *= getattr(info, f"{name}_mesh_size")
        for (part, group), present, count in zip(ours, here, counts.tolist(), strict=True):
            if 0 < count < processes:
                if not getattr(group, "reduce_scatter_unused_params", False):
                    name = getattr(part, "_param_fqn", None) or f"one of shape {tuple(part.sharded_param.shape)}"
                    uneven.append(f"{name} ({count} of {processes} processes)")
                elif not present:
                    elsewhere.add(id(part))
    if uneven:
        raise RuntimeError(
            f"found {len(uneven)} sharded parameters that some processes use in their loss and others do not, "
            f"{', '.join(uneven[:3])}: backward would wait for gradients that never come. Use the same parameters in "
            "every process, or call model.set_reduce_scatter_unused_params(True)"
        )
    return elsewhere
