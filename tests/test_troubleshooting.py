"""Every message on the page about troubleshooting is one that users get: each is provoked here."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hesscale_lightning import (
    AdaHesScale,
    CalibratedRadius,
    CurvatureTrace,
    HesScaleCallback,
    SkipNonfiniteSteps,
    StepSizeScaling,
    attach,
    compile_step,
)
from hesscale_lightning._torch_names import require
from hesscale_lightning.command_line.cli import main
from sb3_integration import HesScaleActorCriticMixin, HesScaleActorCriticPolicy, HesScaleLoggingCallback

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
CONFIG = "examples/lightning/digits_mlp.yaml"
PROVOKED: dict[str, Callable[[], object]] = {}


def provokes(message: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Registers a function that meets the error or warning with this message."""

    def register(function: Callable[[], object]) -> Callable[[], object]:
        PROVOKED[message] = function
        return function

    return register


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(torch.randn(6, 3)), torch.randint(2, (6,)))


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Module(L.LightningModule):
    automatic = True

    def __init__(self, net: nn.Module | None = None):
        super().__init__()
        self.net = net or network()
        self.automatic_optimization = self.automatic

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ManualModule(Module):
    automatic = False


def fit(
    *callbacks: L.Callback, module: L.LightningModule | None = None, strategy: object = "auto", steps: int = 1
) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module or Module(), torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=4))


def ppo(policy: object, **policy_kwargs: object) -> PPO:
    return PPO(policy, "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu", policy_kwargs=policy_kwargs)


@provokes("which the installed torch")
def another_torch() -> None:
    require(["torch._C._a_name_that_torch_has_dropped"])


@provokes("no curvature rule for")
def unknown_operation() -> None:
    attach(loss_of(nn.Sequential(network(), Wrapped())))


class Wrapped(nn.Module):
    def forward(self, x):
        return Own.apply(x)


@provokes("a compiled model is one opaque operation")
def compiled() -> None:
    attach(loss_of(torch.compile(network(), backend="aot_eager")))


@provokes("reentrant checkpointing hides the operations")
def reentrant() -> None:
    model = network()
    x = torch.randn(6, 3, requires_grad=True)
    attach(checkpoint(model, x, use_reentrant=True).square().mean())


@provokes("the loss contains a gradient that was computed with create_graph=True")
def penalty() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(network()(x).sum(), x, create_graph=True)
    attach(slope.square().sum())


@provokes("computes a complex tensor")
def complex_numbers() -> None:
    w = torch.randn(4, requires_grad=True)
    attach(torch.fft.fft(w).abs().sum())


@provokes("the loss must have one element")
def vector() -> None:
    attach(network()(torch.randn(6, 3)))


@provokes("the loss does not require grad")
def detached() -> None:
    attach(loss_of(network()).detach())


@provokes("the loss is a leaf tensor")
def leaf() -> None:
    attach(torch.ones((), requires_grad=True))


@provokes("params must contain tensors")
def modules() -> None:
    model = network()
    attach(loss_of(model), [model])


@provokes("this loss is attached already")
def twice() -> None:
    loss = loss_of(network())
    attach(loss)
    attach(loss)


@provokes("the graph of this loss was freed by an earlier backward()")
def too_late() -> None:
    loss = loss_of(network())
    loss.backward()
    attach(loss)


@provokes("a hook changed the gradient before")
def hook() -> None:
    model = network()
    hidden = model[:2](torch.randn(6, 3))
    hidden.register_hook(lambda g: 2 * g)
    loss = F.cross_entropy(model[2](hidden), torch.randint(2, (6,)))
    attach(loss)
    loss.backward()


@provokes("the tensor given to attach() no longer exists")
def another_tensor() -> None:
    part = loss_of(network())
    attach(part)
    loss = 2 * part
    del part
    loss.backward()


@provokes("two attached losses met in one backward pass")
def two_losses() -> None:
    model = network()
    first, second = loss_of(model), loss_of(model)
    attach(first)
    attach(second)
    (first + second).backward()


@provokes("an earlier backward pass over this graph did not finish")
def unfinished() -> None:
    model, fails = network(), [True]

    def interrupt(g):
        if fails.pop():
            raise KeyboardInterrupt

    hidden = model[:2](torch.randn(6, 3))
    hidden.register_hook(interrupt)
    loss = F.cross_entropy(model[2](hidden), torch.randint(2, (6,)))
    attach(loss)
    with pytest.raises(KeyboardInterrupt):
        loss.backward(retain_graph=True)
    fails.append(False)
    loss.backward()


@provokes("has a gradient but no Hessian diagonal")
def no_diagonal() -> None:
    model = network()
    loss_of(model).backward()
    AdaHesScale(model.parameters()).step()


@provokes("AdaHesScale cannot go on from the state of another optimizer")
def state_of_adam() -> None:
    model = network()
    AdaHesScale(model.parameters()).load_state_dict(torch.optim.Adam(model.parameters()).state_dict())


@provokes("and this optimizer takes it in")
def radius_in_other_units() -> None:
    model = network()
    saved = AdaHesScale(model.parameters(), radius=CalibratedRadius(lambda: 1.0, name="nats")).state_dict()
    AdaHesScale(model.parameters()).load_state_dict(saved)


@provokes("AdaHesScale has a trust region of its own")
def two_regions() -> None:
    StepSizeScaling(AdaHesScale(network().parameters()))


@provokes("LBFGS moves the parameters several times in one step")
def lbfgs() -> None:
    StepSizeScaling(torch.optim.LBFGS(network().parameters()))


@provokes("after backward() and before optimizer.step(), which takes the diagonals")
def weights() -> None:
    CurvatureTrace().update(network().parameters())


@provokes("which splits parameters between processes")
def fully_sharded() -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    callback = HesScaleCallback()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback])
    trainer._accelerator_connector.strategy = FSDPStrategy.__new__(FSDPStrategy)
    callback.setup(trainer, Module(), "fit")


@provokes("HesScaleCallbacks, expected one")
def two_callbacks() -> None:
    fit(HesScaleCallback(), HesScaleCallback("hesscale_gn"))


class NotFinite(Module):
    def training_step(self, batch, batch_idx):
        return self.net(batch).sum() * float("nan")


@provokes("which is not finite")
def bad_batch() -> None:
    fit(SkipNonfiniteSteps(), module=NotFinite())


@provokes("the next one is not finite either")
def bad_batches() -> None:
    fit(SkipNonfiniteSteps(max_in_a_row=1), module=NotFinite(), steps=2)


@provokes("measure_decrease=True with manual optimization")
def manual() -> None:
    fit(HesScaleCallback(measure_decrease=True), module=ManualModule())


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3, 12)

    def forward(self, x):
        q, k, v = self.project(x).view(1, 1, -1, 12).chunk(3, -1)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)


@provokes("audit needs the second derivatives of the loss")
def audit_of_fused_attention() -> None:
    fit(HesScaleCallback(audit="exact", audit_every_n_steps=1), module=Module(FusedAttention()))


class Untagged(HesScaleActorCriticPolicy):
    def evaluate_actions(self, obs, actions):
        latent = self.mlp_extractor.forward_actor(self.extract_features(obs, self.pi_features_extractor))
        dist = self._get_action_dist_from_latent(latent)
        values = self.value_net(latent).as_subclass(torch.Tensor)
        return values, dist.log_prob(actions), dist.entropy()


@provokes("is about to step without curvature")
def untagged() -> None:
    ppo(Untagged, radius="loss").learn(8)


@provokes("HesScaleLoggingCallback needs a policy of sb3_integration")
def other_policy() -> None:
    ppo("MlpPolicy").learn(8, callback=HesScaleLoggingCallback())


@provokes("which Stable-Baselines3 overwrites before every train()")
def lr_of_a_network() -> None:
    ppo(HesScaleActorCriticPolicy, actor_optimizer_kwargs={"lr": 0.1})


@provokes("before the mixin, which would then have no effect")
def mixin_last() -> None:
    class Policy(ActorCriticPolicy, HesScaleActorCriticMixin):
        pass


@provokes("runs eagerly, because")
def cannot_be_captured() -> None:
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    step = compile_step(Branching(3, 3), lambda y: y.square().mean(), backend="eager", silent=True)
    step(torch.ones(2, 3))


def report(*args: str) -> None:
    main(["report", "--config", CONFIG, *args])


@provokes("Its arguments are:")
def wrong_argument() -> None:
    report("--model.init_args.optimiser", "Adam")


class OwnActivation(nn.Tanh):
    pass


@provokes("and loading would run that code")
def policy_with_a_class_of_ones_own() -> None:
    ppo(HesScaleActorCriticPolicy, activation_fn=OwnActivation).policy.save("policy.pth")
    HesScaleActorCriticPolicy.load("policy.pth")


@provokes("which torch.load cannot read as weights")
def empty_file() -> None:
    Path("empty.ckpt").touch()
    report("--ckpt", "empty.ckpt")


@provokes("expected a checkpoint that")
def foreign_file() -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}}, "foreign.ckpt")
    report("--ckpt", "foreign.ckpt")


def on_the_page() -> list[str]:
    return re.findall(r"^### `(.*)`$", PAGE.read_text(), re.MULTILINE)


def test_the_page_and_the_provoked_messages_are_the_same():
    assert sorted(on_the_page()) == sorted(PROVOKED)


@pytest.mark.parametrize("message", PROVOKED)
def test_the_message_is_what_users_get(message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(globals(), "CONFIG", str(Path(CONFIG).resolve()))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            PROVOKED[message]()
            said = ""
        except SystemExit:
            said = capsys.readouterr().err
        except Exception as error:
            said = str(error)
    assert message in " ".join(" ".join([said, *(str(w.message) for w in warned)]).split())
