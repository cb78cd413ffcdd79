"""Curvature that rides on the ordinary backward pass.

:func:`attach` reads the graph of a loss and plans how curvature is carried down it (:mod:`.plan`); hooks on the graph's
nodes deliver the gradients. A structure of graphs that is met for the first time has its rules run
(:mod:`.interpreted`). The second time what they do is taken down and becomes a program, which all later graphs of the
structure run (:mod:`.compiled`): they are recognised by code written for it (:mod:`.structure`), and not planned again.
The diagonals are written to ``p.hess_diag`` when backward ends. Nothing is recomputed, no second graph is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor
from torch.utils.checkpoint import CheckpointError, GraphExecGroup

from hesscale_lightning.curvature.attachment import Attachment, together
from hesscale_lightning.curvature.compiled import CompiledPass
from hesscale_lightning.curvature.graph import Node, Trace, trace
from hesscale_lightning.curvature.interpreted import InterpretedPass
from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.plan import Output
from hesscale_lightning.curvature.planning import (
    cells_of_goals,
    make_plan,
    refuse_freed_graph,
    refuse_hidden_parameters,
)
from hesscale_lightning.curvature.program import Program, compile_program
from hesscale_lightning.curvature.recorded_operation import RecordedOperation, Recording
from hesscale_lightning.curvature.registry import find_rule
from hesscale_lightning.curvature.sharding import hold, sharded_modules
from hesscale_lightning.curvature.structure import MOST_NODES, Met, Structure, StructureCache, fingerprint, slots_of
from hesscale_lightning.curvature.tensor_parallel import is_split, refuse_distributed_loss

Method = Literal["hesscale", "hesscale_gn", "bl89", "hesscale_rank1"]
METHODS: tuple[str, ...] = get_args(Method)

_OWNER = "_hesscale_attachment"  # the attribute in which a loss keeps its attachment alive
_structures = StructureCache()


def attach(loss: Tensor, params: Iterable[Tensor] | None = None, *, method: Method = "hesscale") -> Attachment:
    """Arms the graph of ``loss``, so that the following ``loss.backward()`` also adds to ``p.hess_diag``.

    For ``y = f(x, ...)`` with ``g = dL/dy`` and ``h ~ diag(d2L/dy2)``, every operation passes on

        ``h_x = sum_j (dy_j/dx)^2 h_j + sum_j g_j d2y_j/dx^2``

    Nothing is written before backward ends; if it raises, no diagonal has changed. Diagonals add up over several
    backward passes exactly as ``.grad`` does, and live as long: where a parameter had no gradient when backward began,
    because ``zero_grad`` took it, its diagonal starts anew as well. With ``zero_grad(set_to_none=False)`` set
    ``p.hess_diag = None`` yourself; this package's optimizers do.

    Args:
        loss: A real tensor with one element that requires grad: the one on which ``backward()`` will be called.
        params: The tensors that receive a diagonal, each of the tensor's shape, in its dtype (float32 for half
            precision). None takes every leaf that requires grad. Frozen tensors, and those that the loss does not
            reach, get none. A tensor inside the graph may be named as well, for example a network's output.
        method: ``"hesscale"``; ``"hesscale_gn"``, which drops second derivatives inside the network, that is, at every
            operation that has a parameterised operation, or a source, between itself and the loss; ``"bl89"``, Becker
            and LeCun's recursion, which takes softmax and log-softmax for pointwise operations; ``"hesscale_rank1"``, a
            closer estimate for about the same cost: in each sample the part of the Hessian along the gradient is taken
            through the network exactly, and only the remainder by the recursion above, as far down as samples do not
            mix.

    Returns:
        The armed pass. It need not be kept; its ``remove()`` disarms.

    Raises:
        UnsupportedOperationError: An operation between the loss and a wanted tensor has no rule.
        ValueError, TypeError: The loss is not a scalar that requires grad, or an argument is wrong.
        RuntimeError: The graph was freed by an earlier backward, or is armed already. Raised by backward, before a
            diagonal is written: a hook on a tensor or module has changed a gradient, of which curvature knows nothing.

    Example:
        >>> import torch
        >>> from hesscale_lightning.curvature import attach
        >>> model = torch.nn.Linear(3, 2)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.randint(2, (8,)))
        >>> _ = attach(loss)
        >>> loss.backward()
        >>> model.weight.hess_diag.shape
        torch.Size([2, 3])

    Source: Elsayed, Farrahi, Dangel, Mahmood, "Revisiting Scalable Hessian Diagonal Approximations for Applications in
    Reinforcement Learning", ICML 2024, arXiv 2406.03276; Becker and LeCun, 1989.
    """
    root = root_of(loss, method)
    wanted = _by_id(params)
    try:
        attachment = _attached_sharded(loss, root, wanted, method) if sharded_modules else None
        if attachment is None:
            attachment = _attached(loss, root, wanted, method)
    except RuntimeError as error:
        tell_freed_graph(error)
        raise
    setattr(loss, _OWNER, attachment)
    return attachment


def tell_freed_graph(error: RuntimeError) -> None:
    """Raises in plain words if an error is torch's for a graph whose saved tensors are gone."""
    if "through the graph a second time" in str(error):
        raise RuntimeError(
            "the graph of this loss was freed by an earlier backward(): attach, or ask for coverage, before backward, "
            "and attach once per backward; to go through one graph twice use retain_graph=True"
        ) from None


def _attached(loss: Tensor, root: Node, wanted: dict[int, Tensor] | None, method: str) -> Attachment:
    try:
        return together(GraphExecGroup(), _armed, loss, root, wanted, method)  # type: ignore[no-any-return]
    except CheckpointError:  # a tensor is asked for twice, which a group hands out once: recompute for each
        return _armed(loss, root, wanted, method)


def _attached_sharded(loss: Tensor, root: Node, wanted: dict[int, Tensor] | None, method: str) -> Attachment | None:
    """The armed pass of a graph with modules under ``fully_shard``; None if there are none in it."""
    held, wanted = hold(root, wanted, method)
    if held is None:
        return None
    try:
        attachment = _attached(loss, root, wanted, method)
    except BaseException:
        held.release()
        raise
    if attachment.active:
        attachment.held = held
    else:
        held.release()
    return attachment


def backward(
    loss: Tensor, params: Iterable[Tensor] | None = None, *, method: Method = "hesscale", **backward_kwargs: Any
) -> None:
    """``loss.backward(**backward_kwargs)`` that also adds to ``p.hess_diag``: :func:`attach` and ``backward`` in one.

    Args:
        loss: As for :func:`attach`.
        params: As for :func:`attach`.
        method: As for :func:`attach`.
        backward_kwargs: Passed to ``torch.Tensor.backward``. With ``inputs=`` only those receive gradient and diagonal.

    Example:
        >>> import torch
        >>> from hesscale_lightning.curvature import backward
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> backward((w**3).sum())
        >>> w.grad, w.hess_diag
        (tensor([ 3., 12.]), tensor([ 6., 12.]))
    """
    inputs = backward_kwargs.get("inputs")
    if inputs is not None:  # those alone receive a gradient
        chosen = _by_id([inputs] if isinstance(inputs, Tensor) else inputs) or {}
        params = chosen.values() if params is None else [p for p in params if id(p) in chosen]
    attachment = attach(loss, params, method=method)
    try:
        loss.backward(**backward_kwargs)
    finally:
        attachment.remove()


def root_of(loss: Tensor, method: str) -> Node:
    """The node at which the graph of ``loss`` begins; raises if the loss or the method cannot be used."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a torch.Tensor, got {type(loss).__name__}")
    refuse_distributed_loss(loss)
    root = loss.grad_fn
    if root is None or loss.numel() != 1 or loss.dtype.is_complex:
        raise _unsuitable(loss)
    earlier = loss.__dict__.get(_OWNER)
    if earlier is not None and earlier.active:
        if not earlier._started:
            raise RuntimeError(
                "this loss is attached already, and attaching it again would count its curvature twice: attach once "
                "per backward(), or remove() the earlier attachment"
            )
        earlier.remove()  # its backward failed
    return root


def _unsuitable(loss: Tensor) -> Exception:
    if not loss.requires_grad:
        return ValueError(
            "the loss does not require grad, so there is no graph to read: was it computed under torch.no_grad(), "
            "detached, or from parameters that are all frozen?"
        )
    if loss.numel() != 1:
        return ValueError(
            f"the loss must have one element, got shape {tuple(loss.shape)}: reduce it with mean() or sum()"
        )
    if loss.is_complex():
        return TypeError(f"the loss must be real, got {loss.dtype}")
    return ValueError("the loss is a leaf tensor: there is no operation between it and the parameters")


def wanted_tensors(params: Iterable[Tensor] | None) -> tuple[dict[int, Tensor] | None, dict[Output, Tensor]]:
    """The wanted tensors by id (None: every leaf), and those that are no leaves by the output they are."""
    wanted = _by_id(params)
    return wanted, {} if wanted is None else _inner(wanted)


def _by_id(params: Iterable[Tensor] | None) -> dict[int, Tensor] | None:
    if params is None:
        return None
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, got a single tensor: write [tensor]")
    return {id(p): p for p in params}


def _inner(wanted: dict[int, Tensor]) -> dict[Output, Tensor]:
    """The wanted tensors that are no leaves, by the output they are."""
    inner: dict[Output, Tensor] = {}
    for p in wanted.values():
        if not isinstance(p, Tensor):
            raise TypeError(
                f"params must contain tensors, got {type(p).__name__}; for a module pass module.parameters(), "
                "for an optimizer the tensors of its param_groups"
            )
        if p.grad_fn is not None:
            inner[(p.grad_fn, p.output_nr)] = p
    return inner


def _armed(loss: Tensor, root: Node, wanted: dict[int, Tensor] | None, method: str) -> Attachment:
    """The armed pass. Everything that can be refused is before the graph is touched."""
    key = (type(root), method, None if wanted is None else len(wanted))
    recognised = _structures.recognised(key, root, wanted)
    if recognised is not None and not _fits(recognised[0], wanted):
        recognised = None
    if recognised is not None:
        compiled = _compiled(loss, root, wanted, method, *recognised)
        if compiled is not None:
            return compiled
    inner = {} if wanted is None else _inner(wanted)
    found = trace(root, wanted, inner)
    refuse_hidden_parameters(root, found)
    refuse_freed_graph(found)
    device_type = loss.device.type
    if found.index[root] < 0:
        return Attachment(device_type)
    slots, structure, visits, facts = {}, None, 0, {}
    split = is_split(root, found, method)
    if not inner and not split and len(found.edges) <= MOST_NODES:
        slots = slots_of(found)
        if recognised is None:
            structure = _structures.known(key, fingerprint(found, slots))
            met = structure.match(root, wanted) if structure.match is not None else None
            if met is not None:
                compiled = _compiled(loss, root, wanted, method, structure, met)
                if compiled is not None:
                    return compiled
        else:
            structure, met = recognised
        if met is None:
            structure.visits += 1
            visits = structure.visits
        else:
            visits = structure.variant(met[2]).visits
            facts = structure.facts(met[2])
    writes = structure is not None and (visits >= 2 or _structures.unused < _structures.patience)
    recording = Recording(found.nodes, found.edges, slots) if writes else None
    interpreted = _interpreter(device_type, root, found, inner, method, recording)
    if recording is not None and structure is not None:
        interpreted.when_recorded(partial(_write, structure, recording, found, slots, wanted is None, facts))
    interpreted.split = split
    interpreted.watched(loss, found.nodes)
    return interpreted


def _fits(structure: Structure, wanted: dict[int, Tensor] | None) -> bool:
    """Whether a graph of this structure leads to all wanted tensors, or to all that are leaves."""
    return wanted is None or len(structure.leaves) == len(wanted) or not _inner(wanted)


def _compiled(
    loss: Tensor, root: Node, wanted: dict[int, Tensor] | None, method: str, structure: Structure, met: Met
) -> CompiledPass | None:
    """The armed pass of a graph for which there is a program; None if there is none yet."""
    nodes, saved, signature = met
    variant = structure.variant(signature)
    if variant.program is None:
        variant.visits += 1
        return None
    if not variant.used:
        variant.used = True
        _structures.unused -= 1
    device_type = loss.device.type
    instead = partial(_interpreted, device_type, root, wanted, method)
    compiled = CompiledPass(device_type, variant.program, structure, nodes, saved, instead)
    compiled.watched(loss, nodes)
    return compiled


def _interpreted(device_type: str, root: Node, wanted: dict[int, Tensor] | None, method: str) -> InterpretedPass | None:
    """A pass that runs rules, not armed."""
    found = trace(root, wanted)
    return _interpreter(device_type, root, found, {}, method, None) if found.index[root] >= 0 else None


def _interpreter(
    device_type: str,
    root: Node,
    found: Trace,
    inner: Mapping[Output, Tensor],
    method: str,
    recording: Recording | None,
) -> InterpretedPass:
    def operation(position: int, needs: list[bool], flips: list[bool]) -> Operation:
        node = found.nodes[position]
        if recording is not None:
            return RecordedOperation(recording, position, node.next_functions, needs, flips, method)
        return Operation(node, node.next_functions, needs, flips, method)

    condition = (lambda *_: None) if recording is None else recording.condition
    plan = make_plan(root, found, list(inner), method, operation, condition)
    sinks = {cell: (output[0], inner[output]) for output, cell in cells_of_goals(plan, found, list(inner)).items()}
    return InterpretedPass(device_type, plan, found.nodes, sinks, recording)


def _write(
    structure: Structure,
    recording: Recording,
    found: Trace,
    slots: Mapping[Node, int],
    wants_all: bool,
    facts: Mapping[Any, Any],
    results: Mapping[int, int],
) -> tuple[Program, list[Any]]:
    """Writes the program of a pass that was taken down, and the code that recognises graphs like its own.

    Returns:
        The program, and the names of its inputs.
    """
    known = {**facts, **recording.facts()}
    news = structure.learn(recording.conditions, recording.fetches)
    signature = structure.signature(known)
    if signature is None:  # another graph of this structure was asked for what this one has not
        structure.forget()
        news = structure.learn(recording.conditions, recording.fetches)
        signature = structure.signature(known)
    structure.prepares.update(_prepares(recording))
    if news or structure.match is None:
        structure.write(found, slots, wants_all)
    inputs = list(structure.fetches)
    program = compile_program(recording.recorder.lines, inputs, results)
    if signature is not None:
        structure.variant(signature).program = program
        _structures.unused += 1
    return program, inputs


def _prepares(recording: Recording) -> dict[int, Callable[[Node], Any]]:
    """By position, what rules prepare from a node when it is attached: also of operations that no step is left of."""
    prepares: dict[int, Callable[[Node], Any]] = {}
    for position, arguments in recording.preparing.items():
        rule = find_rule(recording.nodes[position])
        if rule is not None and rule.prepare is not None:
            prepares[position] = partial(_prepared, rule.prepare, *arguments)
    return prepares


def _prepared(prepare: Callable[[Operation], Any], needs: Any, flips: Any, method: str, node: Node) -> Any:
    return prepare(Operation(node, node.next_functions, needs, flips, method))
