"""What only a GPU can show: its own kernels and nodes, mixed precision, and steps captured in a graph.

``make test-cuda``, or ``pytest -m cuda``; skipped where there is no GPU.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hesscale_lightning import AdaHesScale
from hesscale_lightning.curvature import UnsupportedOperationError, attach, backward, exact_local_diag
from tests.curvature.device_kernels import on_the_cpu
from tests.curvature.models import MODELS, Model
from tests.curvature.oracle import Case, Probe, node_names

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """No TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class OnDevice(TorchFunctionMode):
    """Moves constants of a case, which lie on the CPU, to where its inputs are."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def moved(x: Any) -> Any:
            if isinstance(x, Tensor) and x.dim() and x.device.type == "cpu":
                with torch._C.DisableTorchFunction():
                    return x.to(DEVICE)
            return x

        return function(*tree_map(moved, args), **tree_map(moved, kwargs or {}))


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    with torch.device(DEVICE), OnDevice():
        yield


# -- every case of every family ---------------------------------------------------------------------------------------


def tables() -> Iterator[tuple[str, str, Case]]:
    """Family, table and case."""
    for path in sorted((Path(__file__).parent / "curvature").glob("test_*.py")):
        module = importlib.import_module(f"tests.curvature.{path.stem}")
        for name, table in vars(module).items():
            if isinstance(table, list):
                for case in table:
                    if isinstance(case, Case):
                        yield path.stem.removeprefix("test_"), name, case


def unique(found: Iterator[tuple[str, str, Case]], of_devices: bool) -> list[Any]:
    seen: dict[int, Any] = {}
    for family, table, case in found:
        if (table == "OF_DEVICES") is of_devices:
            seen.setdefault(id(case), pytest.param(case, id=f"{family}: {case.name}"))
    return list(seen.values())


CASES = [
    case for case in unique(tables(), of_devices=False) if "MkldnnConvolutionBackward0" not in case.values[0].nodes
]
#: Nodes that no NVIDIA GPU makes, or only in half precision: of those, see test_fused_attention.
ELSEWHERE = ("Miopen", "Overrideable", "FlashAttention", "CudnnAttention")
OF_DEVICES = [
    case
    for case in unique(tables(), of_devices=True)
    if not any(word in name for word in ELSEWHERE for name in case.values[0].nodes)
]


def outputs_of(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    outputs = case.operation(*inputs)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def inputs_of(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(device, dtype).requires_grad_() for x in case.tensors()]


def received(case: Case, dtype: torch.dtype, with_g: bool, with_h: bool) -> tuple[list[Tensor], list[Tensor]]:
    """A random gradient and curvature for each output."""
    with torch.no_grad():
        shapes = [y.shape for y in outputs_of(case, inputs_of(case, "cpu", dtype))]
    generator = torch.Generator().manual_seed(2)
    g = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * with_g for shape in shapes]
    h = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * with_h for shape in shapes]
    return g, h


def diagonals(
    case: Case, device: str, dtype: torch.dtype, g: Sequence[Tensor], h: Sequence[Tensor], method: Any
) -> tuple[list[Tensor], list[Tensor], set[str]]:
    """The diagonals of the inputs, the outputs, both on the CPU, and the names of the nodes."""
    inputs = inputs_of(case, device, dtype)
    with on_device() if device == DEVICE else contextlib.nullcontext():
        outputs = outputs_of(case, inputs)
    scaled = outputs
    if method == "hesscale_gn":
        one = torch.ones((), dtype=dtype, device=device, requires_grad=True)
        scaled = [y * one for y in outputs]
    arriving = [t.to(device) for t in (*g, *h)]
    loss = Probe.apply(len(outputs), *scaled, *arriving)
    names = node_names(loss)
    backward(loss, method=method)
    return [x.hess_diag.cpu() for x in inputs], [y.detach().cpu() for y in outputs], names


def assert_alike(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    scale = max([float(e.abs().max()) for e in expected if e.numel()], default=0.0)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        assert f.dtype == e.dtype
        error = float((f - e).abs().max()) if e.numel() else 0.0
        assert error <= tolerance * max(scale, 1e-6), f"error {error:.3e} at scale {scale:.3e}"


@contextlib.contextmanager
def without_cudnn(case: Case) -> Iterator[None]:
    """A recurrent layer that cuDNN fuses is refused."""
    fused = any("Rnn" in name for name in case.nodes)
    with torch.backends.cudnn.flags(enabled=not fused), torch.backends.mkldnn.flags(enabled=not fused):
        yield


def compare(case: Case, dtype: torch.dtype, tolerance: float) -> set[str]:
    """Compares GPU and CPU in all the ways of :func:`tests.curvature.oracle.check`; returns the GPU's nodes."""
    names: set[str] = set()
    for with_g, with_h, method in ((1, 1, "hesscale"), (1, 0, "hesscale"), (0, 1, "hesscale"), (1, 1, "hesscale_gn")):
        if case.at_loss and with_h:
            continue
        with without_cudnn(case):
            g, h = received(case, dtype, bool(with_g), bool(with_h))
            expected, there, _ = diagonals(case, "cpu", dtype, g, h, method)
            found, here, names = diagonals(case, DEVICE, dtype, g, h, method)
            if not all(torch.allclose(a, b, 1e-3, 1e-4, equal_nan=True) for a, b in zip(here, there, strict=True)):
                # Another random mask, another sign of an eigenvector: then dense derivatives on the GPU decide.
                reference = case.reference or case.operation
                zeros = [torch.zeros_like(t) for t in g] if method == "hesscale_gn" else g
                arriving = [[t.to(DEVICE) for t in ts] for ts in (zeros, h)]
                with on_device():
                    expected = [e.cpu() for e in exact_local_diag(reference, inputs_of(case, DEVICE, dtype), *arriving)]
        assert_alike(found, expected, tolerance)
    return names


def has_double_precision(case: Case) -> bool:
    try:
        with without_cudnn(case):
            outputs_of(case, inputs_of(case, "cpu", torch.float64))
    except RuntimeError as error:
        if any(word in str(error) for word in ("Double", "double", "Float")):
            return False
        raise
    return True


@pytest.mark.parametrize("case", CASES)
def test_rule_on_the_gpu_is_the_one_on_the_cpu(case: Case) -> None:
    if has_double_precision(case):
        compare(case, torch.float64, 1e-8)
    else:
        compare(case, torch.float32, 1e-4)


@pytest.mark.parametrize("case", OF_DEVICES)
def test_rule_of_the_gpus_own_node(case: Case) -> None:
    with on_the_cpu():
        names = compare(case, torch.float32, 1e-4)
    assert set(case.nodes) <= names


@pytest.mark.parametrize(
    ("backend", "node", "dtype"),
    [
        (SDPBackend.EFFICIENT_ATTENTION, "Efficient", torch.float32),
        (SDPBackend.EFFICIENT_ATTENTION, "Efficient", torch.float16),
        (SDPBackend.FLASH_ATTENTION, "Flash", torch.float16),
        (SDPBackend.CUDNN_ATTENTION, "Cudnn", torch.float16),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention(backend: SDPBackend, node: str, dtype: torch.dtype, causal: bool) -> None:
    """Against the same numbers in single precision on the CPU."""
    generator = torch.Generator().manual_seed(6)
    whole = [torch.randn((2, 4, 64, 32), generator=generator).to(dtype) for _ in range(3)]
    target = torch.randn((2, 4, 64, 32), generator=generator)
    found = []
    for device in ("cpu", DEVICE):
        own = torch.float32 if device == "cpu" else dtype
        inputs = [x.detach().to(device, own).requires_grad_() for x in whole]
        with sdpa_kernel(backend) if device == DEVICE else contextlib.nullcontext():
            try:
                output = F.scaled_dot_product_attention(*inputs, is_causal=causal)
            except RuntimeError as error:
                pytest.skip(f"this GPU has no such kernel: {error}")
        loss = F.mse_loss(output.float(), target.to(device))
        if device == DEVICE:
            assert f"ScaledDotProduct{node}AttentionBackward0" in node_names(loss)
        backward(loss)
        found.append([x.hess_diag.cpu() for x in inputs])
    assert_alike(found[1], found[0], 1e-4 if dtype is torch.float32 else 2e-2)


def moved(module: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """The loss of a model of the tests, whose data lie on the CPU."""
    with on_device():
        return loss(module)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_model_on_the_gpu(model: Model) -> None:
    """Also with what cuDNN fuses, which is refused with advice that works."""
    module, loss = model.build(torch.float64)
    module.eval()  # dropout's masks are others there
    expected = copy.deepcopy(module)
    with torch.backends.mkldnn.flags(enabled=False):
        backward(loss(expected))
    module.to(DEVICE)
    try:
        backward(moved(module, loss))
    except UnsupportedOperationError as error:
        assert "torch.backends.cudnn.flags(enabled=False)" in str(error)  # noqa: PT017
        with torch.backends.cudnn.flags(enabled=False):
            backward(moved(module, loss))
    pairs = [(p.hess_diag, q.hess_diag) for p, q in zip(module.parameters(), expected.parameters(), strict=True)
             if hasattr(q, "hess_diag")]  # fmt: skip
    assert_alike([p.cpu() for p, _ in pairs], [q for _, q in pairs], 1e-7)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layer_is_refused_with_advice_that_works(layer: Any) -> None:
    module, x = layer(3, 4), torch.randn(5, 2, 3)
    expected = copy.deepcopy(module)
    with torch.backends.mkldnn.flags(enabled=False):
        backward(expected(x)[0].square().sum())
    module, x = module.to(DEVICE), x.to(DEVICE)
    with pytest.raises(UnsupportedOperationError, match="cudnn"):
        backward(module(x)[0].square().sum())
    with torch.backends.cudnn.flags(enabled=False):
        loss = module(x)[0].square().sum()
    backward(loss)
    for p, q in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.hess_diag.cpu(), q.hess_diag, rtol=1e-3, atol=1e-5)


# -- steps ------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Convolution, batch norm, attention, layer norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 16, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(16)
        self.projection = nn.Linear(16, 48)
        self.layer_norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.batch_norm(self.convolution(x))).flatten(2).mT
        q, k, v = self.projection(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.gelu(self.layer_norm(x + y)).mean(1))


def batches(count: int, device: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    made = [
        (torch.randn((8, 3, 4, 4), generator=generator), torch.randint(5, (8,), generator=generator))
        for _ in range(count)
    ]
    return [(x.to(device), y.to(device)) for x, y in made]


def network(device: str) -> nn.Module:
    torch.manual_seed(8)
    return Network().to(device)


@pytest.mark.parametrize("capturable", [False, True])
def test_optimizer_takes_the_cpus_steps(capturable: bool) -> None:
    trained = []
    for device in ("cpu", DEVICE):
        module = network(device)
        optimizer = AdaHesScale(module.parameters(), capturable=capturable and device == DEVICE)
        for x, y in batches(5, device):
            optimizer.zero_grad()
            backward(F.cross_entropy(module(x), y))
            optimizer.step()
        trained.append([p.detach().cpu() for p in module.parameters()])
    for p, q in zip(*trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_comes_near_single_precision(dtype: torch.dtype) -> None:
    (x, y), (single, mixed) = batches(1, DEVICE)[0], (network(DEVICE), network(DEVICE))
    backward(F.cross_entropy(single(x), y))
    with torch.autocast(DEVICE, dtype):
        loss = F.cross_entropy(mixed(x), y)
    backward(loss)
    for (name, p), q in zip(mixed.named_parameters(), single.parameters(), strict=True):
        assert p.hess_diag.dtype is torch.float32
        assert p.hess_diag.isfinite().all()
        error = float((p.hess_diag - q.hess_diag).norm() / q.hess_diag.norm().clamp(min=1e-6))
        assert error < 0.15, f"{name}: {error}"


def test_loss_scaling_leaves_the_optimizers_steps() -> None:
    trained = []
    for scale in (1.0, 1024.0):
        module = network(DEVICE)
        optimizer = AdaHesScale(module.parameters())
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
        for x, y in batches(3, DEVICE):
            optimizer.zero_grad()
            backward(scaler.scale(F.cross_entropy(module(x), y)))
            scaler.step(optimizer)
            scaler.update()
        trained.append([p.detach() for p in module.parameters()])
    for p, q in zip(*trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Three steps on a side stream, as torch asks for, then one that is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn", "bl89"])
def test_captured_pass_is_the_eager_one(method: Any) -> None:
    module = network(DEVICE)
    data = batches(5, DEVICE)
    x, y = (t.clone() for t in data[0])

    def step() -> None:
        for p in module.parameters():
            p.grad = p.hess_diag = None
        loss = F.cross_entropy(module(x), y)
        attach(loss, method=method)
        loss.backward()

    graph = captured(step)
    diagonals = [p.hess_diag for p in module.parameters()]
    for new_x, new_y in data[1:]:
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        found = [d.clone() for d in diagonals]
        step()
        for f, p in zip(found, module.parameters(), strict=True):
            torch.testing.assert_close(f, p.hess_diag, rtol=1e-3, atol=1e-5 * float(p.hess_diag.abs().max()))


def test_captured_training_is_the_eager_one() -> None:
    trained = []
    data = batches(8, DEVICE)
    for capture in (False, True):
        module = network(DEVICE)
        optimizer = AdaHesScale(module.parameters(), capturable=True)
        x, y = (t.clone() for t in data[0])

        def step(module: Any = module, optimizer: Any = optimizer, x: Tensor = x, y: Tensor = y) -> None:
            optimizer.zero_grad()
            loss = F.cross_entropy(module(x), y)
            attach(loss)
            loss.backward()
            optimizer.step()

        graph = captured(step) if capture else None  # three steps on the first batch; the captured one does not run
        for k in range(3 if capture else 0, len(data) + 3):
            new_x, new_y = data[max(0, k - 3)]
            x.copy_(new_x)
            y.copy_(new_y)
            graph.replay() if graph is not None else step()
        trained.append([p.detach() for p in module.parameters()])
    for p, q in zip(*trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_nothing_waits_for_the_gpu() -> None:
    """In a pass whose plan is known, no rule reads a tensor's value."""
    module = network(DEVICE)
    (x, y) = batches(1, DEVICE)[0]
    for _ in range(2):
        backward(F.cross_entropy(module(x), y))
    loss = F.cross_entropy(module(x), y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
