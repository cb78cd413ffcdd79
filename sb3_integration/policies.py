"""Policies that bring a curvature-aware optimizer to Stable-Baselines3's algorithms, which stay as they are.

Every policy is Stable-Baselines3's own with a mixin before it. The mixin chooses the optimizer, gives each network its
own param group, and tags one output, through which the loss finds the engine (see ``loss_seam``). The mixins are
public: put one before a policy class of your own, or before one of sb3-contrib's (see ``contrib``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.utils import ConstantSchedule, get_device
from stable_baselines3.dqn import policies as dqn
from stable_baselines3.sac import policies as sac
from stable_baselines3.td3 import policies as td3
from torch import Tensor, nn
from torch.optim import Optimizer

from hesscale_lightning.curvature.engine import METHODS, Method
from hesscale_lightning.optim import StepSizeScaling
from sb3_integration import defaults
from sb3_integration.loss_seam import LossSeam, OutputTag, optimizers_of
from sb3_integration.policy_radius import Evaluation, PolicyRadius
from sb3_integration.saved_policies import read_policy

_OptimizerKwargs = Mapping[str, Any] | None
Radius = Literal["kl", "loss"]
_SB3_DISTRIBUTION = ActorCriticPolicy._get_action_dist_from_latent
_SCHEDULE_POINTS = 101  # at which a learning rate schedule is read to find its largest value


class HesScaleMixin(BasePolicy):
    """What the mixins of all algorithms have in common; use one of its subclasses.

    Args:
        args: The policy's own arguments.
        radius: What the trust regions of actor and critic are measured in: "kl", nats for the actor and a fraction of
            its loss for the critic (see :mod:`sb3_integration.policy_radius`), or "loss", units of the loss. None takes
            "kl" for policies of PPO and A2C with AdaHesScale, else "loss".
        method: Curvature estimate: "hesscale", "hesscale_gn", or another of :func:`hesscale_lightning.attach`'s. None
            takes the algorithm's default. With ``radius="kl"`` it is "hesscale_gn".
        actor_optimizer_kwargs: Options of the actor's param group alone, such as ``{"lr_scale": 3.0, "delta": 1e-5}``.
        critic_optimizer_kwargs: The same for the critic.
        features_optimizer_kwargs: The same for what actor and critic share: a common features extractor.
        kwargs: The policy's own keyword arguments. ``optimizer_class`` may be any optimizer; only those that use
            diagonals (:class:`hesscale_lightning.AdaHesScale`, or a function that returns a
            :class:`hesscale_lightning.StepSizeScaling`) cause curvature to be computed.

    Raises:
        ValueError: If an option belongs to no optimizer, or to a network that the policy does not have, or the radius
            cannot be measured.
    """

    _defaults: ClassVar[Mapping[Radius, defaults.OptimizerDefaults]]  # the first one is taken if nothing is said
    seam: LossSeam
    radius: Radius
    policy_radius: PolicyRadius | None = None
    _peak_rate = 0.0  # the largest value of the algorithm's learning rate schedule, where it is known

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(HesScaleMixin)]:
            if issubclass(base, BasePolicy) and not issubclass(base, HesScaleMixin):
                raise TypeError(
                    f"{cls.__name__} names {base.__name__} before the mixin, which would then have no effect: write "
                    "the mixin first, as in class MyPolicy(HesScaleActorCriticMixin, MyActorCriticPolicy)"
                )

    def __init__(
        self,
        *args: Any,
        radius: Radius | None = None,
        method: Method | None = None,
        actor_optimizer_kwargs: _OptimizerKwargs = None,
        critic_optimizer_kwargs: _OptimizerKwargs = None,
        features_optimizer_kwargs: _OptimizerKwargs = None,
        **kwargs: Any,
    ) -> None:
        optimizer_class = kwargs.pop("optimizer_class", None)
        optimizer_kwargs = kwargs.pop("optimizer_kwargs", None)
        families = self._defaults
        injected = self._defaults_if_injected(optimizer_class, optimizer_kwargs)
        if injected is not None:
            families, optimizer_class, optimizer_kwargs = injected, None, None
        self.__dict__["radius"] = radius = self._chosen_radius(radius, families, optimizer_class)
        resolved = defaults.resolve(optimizer_class, optimizer_kwargs, families[radius])
        method = families[radius].method if method is None else method
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if radius == "kl" and method != "hesscale_gn":
            raise ValueError(
                f'radius="kl" measures with Fisher information, a Gauss-Newton matrix: method must be hesscale_gn, got '
                f'{method!r}; for another one pass radius="loss"'
            )
        kwargs.update(optimizer_class=resolved.optimizer_class, optimizer_kwargs=resolved.optimizer_kwargs)
        super().__init__(*args, **kwargs)
        self._user_options = {
            "actor": dict(actor_optimizer_kwargs or {}),
            "critic": dict(critic_optimizer_kwargs or {}),
            "features": dict(features_optimizer_kwargs or {}),
        }
        self._network_options = {
            "actor": self._user_options["actor"],
            "critic": {**resolved.critic, **self._user_options["critic"]},
            "features": {**resolved.features, **self._user_options["features"]},
        }
        if radius == "kl":
            if not self._peak_rate > 0:  # a _build of its own has not read the schedule
                self._peak_rate = float(self.optimizer.param_groups[0]["lr"])
            self.policy_radius = PolicyRadius(self)
        self._group_by_network(families[radius])
        self.seam = LossSeam(self, method)
        self.seam.watch(optimizers_of(self))
        self._tag_outputs()

    def _chosen_radius(
        self, radius: Radius | None, families: Mapping[Radius, defaults.OptimizerDefaults], optimizer_class: Any
    ) -> Radius:
        if radius is None:
            return next(iter(families)) if defaults.is_adahesscale(optimizer_class) else "loss"
        if radius not in get_args(Radius):
            raise ValueError(f'radius must be "kl" or "loss", got {radius!r}')
        if radius not in families:
            raise ValueError(
                f"radius={radius!r} is for policies of PPO, A2C and their relatives, whose actor has a distribution of "
                f'actions that an optimizer moves; {type(self).__name__} takes radius="loss"'
            )
        return radius

    def _defaults_if_injected(
        self, optimizer_class: Any, optimizer_kwargs: _OptimizerKwargs
    ) -> Mapping[Radius, defaults.OptimizerDefaults] | None:
        """The defaults of an algorithm that put an optimizer of its own where the user gave none; None otherwise."""
        return None

    def _tag_outputs(self) -> None:
        """Makes sure that every loss is computed from a tagged tensor."""

    def _network_of(self, owner: nn.Module, param: nn.Parameter) -> str:
        """The network, "actor", "critic" or "features", of a parameter in the optimizer of ``owner``."""
        raise NotImplementedError

    def _group_by_network(self, family: defaults.OptimizerDefaults) -> None:
        """Builds the optimizers anew with a param group for each network, where they can make use of it."""
        names = {id(param): name for name, param in self.named_parameters()}
        unused = {network for network, options in self._user_options.items() if options}
        for owner in (self, *self.children()):
            built = owner.__dict__.get("optimizer")
            if built is None:
                continue
            networks: dict[str, list[tuple[str, nn.Parameter]]] = {}
            for param in (p for group in built.param_groups for p in group["params"]):
                networks.setdefault(self._network_of(owner, param), []).append((names[id(param)], param))
            unused -= set(networks)
            options = {network: self._network_options[network] for network in networks}
            if not hasattr(built, "awaits_diagonals") and not any(options.values()) and self.policy_radius is None:
                continue  # as Stable-Baselines3 made it
            for network in networks:
                _check_options(network, options[network], built)
            groups = [
                {"params": named, "network": network, **options[network], **self._measured_in(network, family, built)}
                for network, named in networks.items()
            ]
            owner.optimizer = self.optimizer_class(groups, lr=built.param_groups[0]["lr"], **self.optimizer_kwargs)  # type: ignore
        if unused:
            raise ValueError(
                f"{', '.join(sorted(unused))}_optimizer_kwargs given, but {type(self).__name__} optimizes no such "
                "network: actor and critic have parameters of their own, features only those of an extractor that they "
                "share"
            )

    def _measured_in(self, network: str, family: defaults.OptimizerDefaults, built: Optimizer) -> dict[str, Any]:
        """The options of a param group whose radius is measured."""
        if self.policy_radius is None:
            return {}
        # The rate is a fraction of the schedule's largest one, and that of the step that fits into the region.
        radius = self.policy_radius.of_network(network, self._peak_rate if self._peak_rate > 0 else 1.0)
        chosen = self._network_options[network]
        if isinstance(built, StepSizeScaling):
            own: Mapping[str, Any] = {"critic": family.critic, "features": family.features}.get(network, {})
            delta = {**family.optimizer_kwargs, **own}["delta"]
            return {"scaling_delta": chosen.get("scaling_delta", delta), "scaling_radius": radius}
        if not hasattr(built, "radii"):
            raise ValueError(
                f'radius="kl" needs an optimizer with a trust region, AdaHesScale or StepSizeScaling, got '
                f"{type(built).__name__}"
            )
        if chosen.get("delta", built.defaults["delta"]) is None:
            raise ValueError('delta is None, which says that there is no trust region: pass radius="loss" with it')
        return {"radius": radius}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        present = {group.get("network") for optimizer in optimizers_of(self) for group in optimizer.param_groups}
        for network, user in self._user_options.items():
            data[f"{network}_optimizer_kwargs"] = self._network_options[network] if network in present else user
        if self._peak_rate > 0:
            data["lr_schedule"] = ConstantSchedule(self._peak_rate)  # Stable-Baselines3 leaves zero
        data["method"] = self.seam.method
        data["radius"] = self.radius
        if hasattr(self, "share_features_extractor"):  # which Stable-Baselines3 leaves out
            data["share_features_extractor"] = self.share_features_extractor
        return data

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.seam.watch(optimizers_of(self))  # hooks of optimizers are not pickled

    def save(self, path: Any) -> None:
        """Saves the policy with the state of its optimizers, which :meth:`load` restores.

        Args:
            path: A file's path, or a file open for writing.
        """
        optimizers = [optimizer.state_dict() for optimizer in optimizers_of(self)]
        data = self._get_constructor_parameters()
        torch.save({"state_dict": self.state_dict(), "data": data, "optimizers": optimizers}, path)

    @classmethod
    def load(cls, path: Any, device: torch.device | str = "auto", *, trusted: bool = False) -> Self:
        """Loads a policy that :meth:`save` wrote, or one without optimizers' state.

        The file holds spaces and classes beside the weights. It is read as weights, with the classes of PyTorch,
        Gymnasium, Stable-Baselines3 and this package that policies are made of; anything else that it names is refused,
        because loading would run it.

        Args:
            path: A file's path, or a file open for reading.
            device: Where to put the policy.
            trusted: Load classes from elsewhere too, such as a features extractor of your own. A file made for the
                purpose then runs any code: only for files from people you trust.

        Raises:
            ValueError: If the file names code from elsewhere, or holds no policy.

        Example:
            >>> import io, stable_baselines3
            >>> file = io.BytesIO()
            >>> stable_baselines3.PPO(HesScaleActorCriticPolicy, "CartPole-v1", device="cpu").policy.save(file)
            >>> _ = file.seek(0)
            >>> policy = HesScaleActorCriticPolicy.load(file)
        """
        device = get_device(device)
        saved = read_policy(path, device, trusted)
        policy = cls(**saved["data"]).to(device)
        policy.load_state_dict(saved["state_dict"])
        if "optimizers" in saved:
            for optimizer, state in zip(optimizers_of(policy), saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        return policy


def _check_options(network: str, options: dict[str, Any], optimizer: Optimizer) -> None:
    if "lr" in options:
        raise ValueError(
            f"{network}_optimizer_kwargs sets lr, which Stable-Baselines3 overwrites before every train(): set "
            "lr_scale, a factor on the algorithm's learning_rate"
        )
    known = set(optimizer.defaults) | ({"scaling_delta"} if isinstance(optimizer, StepSizeScaling) else set())
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"{network}_optimizer_kwargs sets {', '.join(unknown)}, which {type(optimizer).__name__} does not know; "
            f"its options are {', '.join(sorted(known - {'lr'}))}"
        )


class HesScaleActorCriticMixin(HesScaleMixin):
    """For policies of PPO, A2C and their relatives, with ``evaluate_actions`` and ``predict_values``.

    A2C passes RMSprop to every policy unless the user names an optimizer or sets ``use_rms_prop=False``. RMSprop with
    the very options of A2C is therefore taken for "nothing chosen" and replaced by AdaHesScale with A2C's defaults; to
    train with RMSprop, name it with options of your own.
    """

    _defaults: ClassVar = {"kl": defaults.PPO_KL, "loss": defaults.PPO}

    def _defaults_if_injected(
        self, optimizer_class: Any, optimizer_kwargs: _OptimizerKwargs
    ) -> Mapping[Radius, defaults.OptimizerDefaults] | None:
        if not defaults.injected_by_a2c(optimizer_class, optimizer_kwargs):
            return None
        return {radius: {"kl": defaults.A2C_KL, "loss": defaults.A2C}[radius] for radius in self._defaults}

    def _build(self, lr_schedule: Any) -> None:
        points = [k / (_SCHEDULE_POINTS - 1) for k in range(_SCHEDULE_POINTS)]
        self._peak_rate = max(float(lr_schedule(point)) for point in points)
        super()._build(lr_schedule)  # type: ignore[misc]

    def _network_of(self, owner: nn.Module, param: nn.Parameter) -> str:
        belongs = [network for network, modules in self._own_modules().items() if _holds(modules, param)]
        return belongs[0] if len(belongs) == 1 else "features"

    def _own_modules(self) -> dict[str, list[Any]]:
        extractor = getattr(self, "mlp_extractor", None)
        actor = [getattr(self, name, None) for name in ("action_net", "log_std", "lstm_actor", "pi_features_extractor")]
        critic = [getattr(self, name, None) for name in ("value_net", "lstm_critic", "critic", "vf_features_extractor")]
        return {
            "actor": [*actor, getattr(extractor, "policy_net", None)],
            "critic": [*critic, getattr(extractor, "value_net", None)],
        }

    def evaluate_actions(self, *args: Any, **kwargs: Any) -> Any:
        """As the policy's own; the values are tagged, or what goes with them if the critic is frozen."""
        evaluate = super().evaluate_actions  # type: ignore[misc]
        if self.policy_radius is None or not torch.is_grad_enabled():
            values, *others = evaluate(*args, **kwargs)
        else:
            self._follow_rate()
            values, *others = self.policy_radius.evaluate(evaluate, args, kwargs)
        if values.requires_grad:  # one tag is enough, and each makes the operations after it dearer
            return self.seam.tag(values), *others
        return values, *(self.seam.tag(output) for output in others)

    def _follow_rate(self) -> None:
        """A rate that was raised beyond its schedule is the largest one from then on: no step exceeds what fits."""
        rate = max(float(group["lr"]) for group in self.optimizer.param_groups)
        if rate > self._peak_rate:
            self._peak_rate = rate
            for radius in filter(None, getattr(self.optimizer, "radii", ())):
                radius.full_rate = rate

    def look_before(self, *args: Any, **kwargs: Any) -> Evaluation:
        """Evaluates actions before a step whose loss is computed out of sight (see :class:`PolicyRadius`)."""
        assert self.policy_radius is not None
        return self.policy_radius.look_before(super().evaluate_actions, args, kwargs)  # type: ignore[misc]

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Any:
        policy: Any = self
        own: Any = super()._get_action_dist_from_latent  # type: ignore[misc]
        radius = self.policy_radius
        if radius is None or not radius.gives_log_std or own.__func__ is not _SB3_DISTRIBUTION:
            return own(latent_pi)
        mean = policy.action_net(latent_pi)
        if policy.use_sde:
            return policy.action_dist.proba_distribution(mean, radius.log_std_of_gsde(latent_pi), latent_pi)
        return policy.action_dist.proba_distribution(mean, radius.log_std())

    def predict_values(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the policy's own; the values are tagged where they require grad."""
        values: Tensor = self.seam.tag(super().predict_values(*args, **kwargs))  # type: ignore[misc]
        return values


class HesScaleValueMixin(HesScaleMixin):
    """For policies with one network of action values, as DQN's and QR-DQN's."""

    _defaults: ClassVar = {"loss": defaults.DQN}

    def _network_of(self, owner: nn.Module, param: nn.Parameter) -> str:
        return "critic"

    def _tag_outputs(self) -> None:
        network: Any = getattr(self, "q_net", None) or self.quantile_net
        network.register_forward_hook(OutputTag(self.seam))


class HesScaleActionValueMixin(HesScaleMixin):
    """For policies with an actor and critics ``Q(s, a)`` that have an optimizer each, as of SAC, TD3, TQC and CrossQ.

    A tag on the first critic's output covers the actor's loss too, which passes through the critic. Only parameters of
    the optimizer between its ``zero_grad()`` and its ``step()`` receive curvature.
    """

    _defaults: ClassVar = {"loss": defaults.ACTOR_CRITIC_OFF_POLICY}

    def _network_of(self, owner: nn.Module, param: nn.Parameter) -> str:
        return "actor" if owner is self.actor else "critic"

    def _tag_outputs(self) -> None:
        # Not on the critic itself: TD3's actor calls q1_forward, which asks the first network alone.
        critic: Any = self.critic
        critic.q_networks[0].register_forward_hook(OutputTag(self.seam))


def _holds(modules: Iterable[nn.Module | nn.Parameter | None], param: nn.Parameter) -> bool:
    return any(m is param or (isinstance(m, nn.Module) and any(p is param for p in m.parameters())) for m in modules)


class HesScaleActorCriticPolicy(HesScaleActorCriticMixin, ActorCriticPolicy):
    """Policy for PPO and A2C: Stable-Baselines3's ``MlpPolicy`` with AdaHesScale.

    Example:
        >>> from stable_baselines3 import PPO
        >>> from sb3_integration import HesScaleActorCriticPolicy
        >>> model = PPO(HesScaleActorCriticPolicy, "CartPole-v1", n_steps=64, device="cpu").learn(64)
        >>> print([group["network"] for group in model.policy.optimizer.param_groups])
        ['actor', 'critic']
    """


class HesScaleActorCriticCnnPolicy(HesScaleActorCriticMixin, ActorCriticCnnPolicy):
    """Policy for PPO and A2C on images: Stable-Baselines3's ``CnnPolicy`` with AdaHesScale."""


class HesScaleMultiInputActorCriticPolicy(HesScaleActorCriticMixin, MultiInputActorCriticPolicy):
    """Policy for PPO and A2C on dict observations: Stable-Baselines3's ``MultiInputPolicy`` with AdaHesScale."""


class HesScaleDQNPolicy(HesScaleValueMixin, dqn.DQNPolicy):
    """Policy for DQN: Stable-Baselines3's ``MlpPolicy`` with AdaHesScale."""


class HesScaleDQNCnnPolicy(HesScaleValueMixin, dqn.CnnPolicy):
    """Policy for DQN on images: Stable-Baselines3's ``CnnPolicy`` with AdaHesScale."""


class HesScaleDQNMultiInputPolicy(HesScaleValueMixin, dqn.MultiInputPolicy):
    """Policy for DQN on dict observations: Stable-Baselines3's ``MultiInputPolicy`` with AdaHesScale."""


class HesScaleSACPolicy(HesScaleActionValueMixin, sac.SACPolicy):
    """Policy for SAC: Stable-Baselines3's ``MlpPolicy`` with AdaHesScale for actor and critic.

    SAC's entropy coefficient keeps the Adam that SAC itself makes for it.
    """


class HesScaleSACCnnPolicy(HesScaleActionValueMixin, sac.CnnPolicy):
    """Policy for SAC on images: Stable-Baselines3's ``CnnPolicy`` with AdaHesScale."""


class HesScaleSACMultiInputPolicy(HesScaleActionValueMixin, sac.MultiInputPolicy):
    """Policy for SAC on dict observations: Stable-Baselines3's ``MultiInputPolicy`` with AdaHesScale."""


class HesScaleTD3Policy(HesScaleActionValueMixin, td3.TD3Policy):
    """Policy for TD3 and DDPG: Stable-Baselines3's ``MlpPolicy`` with AdaHesScale for actor and critic."""


class HesScaleTD3CnnPolicy(HesScaleActionValueMixin, td3.CnnPolicy):
    """Policy for TD3 and DDPG on images: Stable-Baselines3's ``CnnPolicy`` with AdaHesScale."""


class HesScaleTD3MultiInputPolicy(HesScaleActionValueMixin, td3.MultiInputPolicy):
    """Policy for TD3 and DDPG on dict observations: Stable-Baselines3's ``MultiInputPolicy`` with AdaHesScale."""
