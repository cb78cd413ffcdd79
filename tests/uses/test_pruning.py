"""Pruning by the diagonal: exact on a quadratic, masks that stay or not, and the schedule."""

from itertools import combinations

import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from hesscale_lightning import HesScaleCallback, HesScalePruning, SparsitySchedule, exact_hess_diag
from hesscale_lightning.command_line.cli import main
from hesscale_lightning.uses.masks import LowestImportance, lowest
from tests.lightning_models import CLASSES, FEATURES, Classifier, make_batches, make_loader, make_net


class Quadratic(pl.LightningModule):
    """Half of the mean squared error of a linear model whose inputs are uncorrelated, at its minimum."""

    def __init__(self, outputs=1, lr=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, outputs).double()
        self.lr = lr
        # columns of a Hadamard matrix, which are orthogonal, of very different lengths; the first is the bias's
        signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(8)] for i in range(8)]).double()
        self.x = signs[:, 1:7] * torch.tensor([0.1, 3.0, 0.5, 1.0, 0.2, 2.0])
        with torch.no_grad():
            self.y = self.net(self.x)

    def loss(self, x, y):
        return (self.net(x) - y).square().sum(1).mean() / 2

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x, self.y), batch_size=3)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def fit(module, callback, epochs=1, loader=None, others=()):
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback, *others],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return trainer


def quadratic_loss(module, weight, bias):
    return (module.x @ weight.T + bias - module.y).square().sum(1).mean().item() / 2


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn", "hesscale_rank1", "bl89"])
def test_on_a_quadratic_no_other_choice_of_weights_costs_less(count, method):
    module = Quadratic()
    weight, bias = module.net.weight.detach().clone(), module.net.bias.detach().clone()
    costs = {}
    for chosen in combinations(range(7), count):
        kept = torch.cat([weight.flatten(), bias])
        kept[list(chosen)] = 0
        costs[chosen] = quadratic_loss(module, kept[:6].view(1, 6), kept[6:])
    callback = HesScalePruning(count, method=method)
    fit(module, callback)
    entries = torch.cat([module.net.weight.detach().flatten(), module.net.bias.detach()])
    assert tuple((entries == 0).nonzero().flatten().tolist()) == min(costs, key=costs.get)


def test_the_importance_is_what_removing_a_weight_costs():
    module = Quadratic()
    weight, bias = module.net.weight.detach().clone(), module.net.bias.detach().clone()
    seen = {}

    class Keeping(HesScalePruning):
        def importance(self, places):
            seen.update({name: cost for (_, name), cost in super().importance(places).items()})
            return super().importance(places)

    fit(module, Keeping(1))
    for i in range(6):
        kept = weight.clone()
        kept[0, i] = 0
        assert seen["weight"][0, i].item() == pytest.approx(quadratic_loss(module, kept, bias), rel=1e-12)
    assert seen["bias"].item() == pytest.approx(quadratic_loss(module, weight, 0 * bias), rel=1e-12)


def test_a_unit_costs_the_sum_over_its_weights_and_its_bias():
    module = Quadratic(outputs=4)
    weight, bias = module.net.weight.detach().clone(), module.net.bias.detach().clone()

    def cost(units):
        keep = torch.ones(4, 1, dtype=torch.float64)
        keep[list(units)] = 0
        return quadratic_loss(module, weight * keep, bias * keep[:, 0])

    best = min(combinations(range(4), 2), key=cost)
    callback = HesScalePruning(2, parameters_to_prune=[(module.net, "weight")], pruning_dim=0)
    fit(module, callback)
    assert tuple((module.net.weight == 0).all(1).nonzero().flatten().tolist()) == best
    assert tuple((module.net.bias == 0).nonzero().flatten().tolist()) == best
    assert (module.net.weight != 0).sum() == 12


def test_units_go_a_part_of_those_left_at_a_time_and_inputs_can_go_too():
    module = Quadratic(outputs=4)
    fit(module, HesScalePruning(0.5, parameters_to_prune=[(module.net, "weight")], pruning_dim=0), epochs=2)
    assert (module.net.weight == 0).all(1).sum() == 3
    module = Quadratic(outputs=4)
    fit(module, HesScalePruning(2, parameters_to_prune=[(module.net, "weight")], pruning_dim=1))
    assert (module.net.weight == 0).all(0).nonzero().flatten().tolist() == [0, 4]  # the two shortest inputs
    assert (module.net.bias != 0).all()


def expected_masks(net, loader, amount):
    """By torch's own pruning, with importances from the dense reference of a linear network."""
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    loss = cross_entropy(net(x), y)
    parameters = [net[0].weight, net[0].bias]
    costs = [h * p**2 / 2 for h, p in zip(exact_hess_diag(loss, parameters), parameters, strict=True)]
    flat = torch.cat([cost.flatten() for cost in costs])
    mask = torch.ones_like(flat)
    mask[flat.argsort()[:amount]] = 0
    return [part.view_as(p) for part, p in zip(mask.split([p.numel() for p in parameters]), parameters, strict=True)]


def test_masks_are_those_of_the_dense_diagonal_of_all_batches():
    """Of a linear classifier, for which HesScale is exact."""
    net = nn.Sequential(nn.Linear(6, 3)).double()
    module = Classifier(net, lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    loader = make_loader(make_batches(5, dtype=torch.float64))
    expected = expected_masks(net, loader, 9)
    fit(module, HesScalePruning(9, make_pruning_permanent=False), loader=loader)
    for mask, name in zip(expected, ("weight", "bias"), strict=True):
        torch.testing.assert_close(getattr(net[0], f"{name}_mask"), mask)


def test_each_parameter_can_be_ranked_by_itself():
    net = make_net()
    module = Classifier(net)
    fit(
        module,
        HesScalePruning(0.25, parameter_names=["weight"], use_global_unstructured=False),
        loader=make_loader(make_batches(3)),
        others=[HesScaleCallback()],
    )
    assert [(layer.weight == 0).sum().item() for layer in (net[0], net[3])] == [12, 6]


@pytest.mark.parametrize("permanent", [True, False])
def test_pruning_is_permanent_only_if_it_is_said_so(permanent, tmp_path):
    net = make_net()
    module = Classifier(net, adam)
    callback = HesScalePruning(0.5, parameter_names=["weight"], make_pruning_permanent=permanent)
    trainer = fit(module, callback, epochs=2, loader=make_loader(make_batches(3)))
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    saved = torch.load(tmp_path / "pruned.ckpt", weights_only=True)["state_dict"]
    assert ("net.0.weight" in saved) == permanent
    assert ("net.0.weight_mask" in saved) == (not permanent)
    assert hasattr(net[0], "weight_mask") == (not permanent)
    if permanent:
        assert isinstance(net[0].weight, nn.Parameter)
        pruned = torch.cat([net[0].weight.flatten(), net[3].weight.flatten()]) == 0
        assert Classifier(make_net()).load_state_dict(saved).missing_keys == []
    else:
        assert (net[0].weight_orig != 0).all()
        pruned = torch.cat([net[0].weight_mask.flatten(), net[3].weight_mask.flatten()]) == 0
    assert pruned.sum() == 36 + 18  # half of 72, and half of what is left


def resumable(folder, permanent, epochs, dim=None):
    net = make_net()
    places = [] if dim is None else [(net[0], "weight")]
    schedule = SparsitySchedule(0.5, begin_epoch=1, end_epoch=1)
    pruning = HesScalePruning(
        schedule, parameters_to_prune=places, pruning_dim=dim, make_pruning_permanent=permanent, batches=2
    )
    saving = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[pruning, saving], accelerator="cpu", logger=False, enable_progress_bar=False
    )
    return Classifier(net, adam), trainer


@pytest.mark.parametrize("dim", [None, 0])
@pytest.mark.parametrize("permanent", [True, False])
def test_a_resumed_run_has_its_masks_and_ends_as_an_uninterrupted_one(permanent, dim, tmp_path):
    loader = make_loader(make_batches(3))
    whole, trainer = resumable(tmp_path / "whole", permanent, 4, dim)
    trainer.fit(whole, loader)
    first, trainer = resumable(tmp_path / "first", permanent, 3, dim)
    trainer.fit(first, loader)
    second, trainer = resumable(tmp_path / "second", permanent, 4, dim)
    trainer.fit(second, loader, ckpt_path=tmp_path / "first" / "epoch=2.ckpt")
    assert trainer.current_epoch == 4
    left = torch.cat([p.flatten() for p in (second.net[0].weight, second.net[0].bias)]) != 0
    assert 0 < left.sum() < 56
    for name in ("weight", "bias"):
        for layer in (0, 3):
            torch.testing.assert_close(getattr(second.net[layer], name), getattr(whole.net[layer], name))
    assert hasattr(second.net[0], "weight_mask") == (not permanent)


@pytest.mark.parametrize("permanent", [True, False])
@pytest.mark.parametrize("names", [["weight"], ["bias"]])
def test_a_resumed_run_gives_each_parameter_its_own_optimizer_state(names, permanent, tmp_path):
    """LayerNorm's weight and bias have one shape: exchanged states would not be noticed."""

    def made(epochs):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES))
        pruning = HesScalePruning(
            0.5, parameter_names=names, make_pruning_permanent=permanent, apply_pruning=lambda epoch: epoch == 0
        )
        options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return Classifier(net, adam), pl.Trainer(max_epochs=epochs, callbacks=[pruning], **options)

    loader = make_loader(make_batches(3))
    whole, trainer = made(4)
    trainer.fit(whole, loader)
    first, trainer = made(2)
    trainer.fit(first, loader)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second, trainer = made(4)
    trainer.fit(second, loader, ckpt_path=tmp_path / "first.ckpt")
    for layer in (0, 1, 3):
        for name in ("weight", "bias"):
            torch.testing.assert_close(getattr(second.net[layer], name), getattr(whole.net[layer], name))


def test_the_rest_goes_on_training_and_what_is_pruned_stays_zero():
    module = Quadratic(lr=0.05)
    with torch.no_grad():
        module.net.weight += 0.5
    masks = []

    class Watching(HesScalePruning):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if hasattr(module.net, "weight_mask"):
                masks.append((module.net.weight_mask.clone(), module.net.weight.detach().clone()))

    before = module.net.weight.detach().clone()
    fit(module, Watching(3, apply_pruning=lambda epoch: epoch == 0), epochs=30)
    assert len(masks) == 29 * 3
    assert all(torch.equal(mask, masks[0][0]) for mask, _ in masks)
    left = masks[0][0].bool()
    assert (module.net.weight[~left] == 0).all()
    assert (module.net.weight[left] != before[left]).all()


def test_a_schedule_reaches_its_sparsity_and_no_training_follows_its_epochs():
    net = make_net()
    schedule = SparsitySchedule(0.8, begin_epoch=1, end_epoch=3)
    sparsities = []

    class Watching(HesScalePruning):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            masks = [getattr(layer, "weight_mask", torch.ones(1)) for layer in (net[0], net[3])]
            sparsities.append((sum((m == 0).sum() for m in masks) / 72).item())

    fit(
        Classifier(net, adam),
        Watching(schedule, parameter_names=["weight"]),
        epochs=6,
        loader=make_loader(make_batches(3)),
    )
    expected = [schedule.sparsity(epoch) for epoch in range(6)]
    assert expected == pytest.approx([0, 0.8 * (1 - (2 / 3) ** 3), 0.8 * (1 - (1 / 3) ** 3), 0.8, 0.8, 0.8])
    assert sparsities == pytest.approx(expected, abs=2 / 72)


def test_it_is_lightnings_callback_and_prunes_after_validation_too():
    module = Quadratic()
    module.validation_step = lambda batch, batch_idx: None
    module.val_dataloader = module.train_dataloader
    callback = HesScalePruning(2, prune_on_train_epoch_end=False, make_pruning_permanent=False)
    assert isinstance(callback, ModelPruning)
    fit(module, callback, epochs=2)
    assert (module.net.weight_mask == 0).sum() + (module.net.bias_mask == 0).sum() == 4


def test_gradients_and_diagonals_of_the_step_are_left_alone():
    module = Quadratic(lr=0.1)
    plain = Quadratic(lr=0.1)
    fit(module, HesScalePruning(0.5, apply_pruning=lambda epoch: False), epochs=3)
    fit(plain, pl.Callback(), epochs=3)
    assert torch.equal(module.net.weight, plain.net.weight)


def test_the_sparsity_is_printed_when_asked_for(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(Quadratic(), HesScalePruning(3, verbose=2))
    assert "HesScalePruning: 3 of 7 entries pruned (42.86%)" in caplog.text
    assert "Linear.weight: " in caplog.text


def test_the_lowest_importance_has_a_sign():
    layer = nn.Linear(3, 1)
    prune.global_unstructured(
        [(layer, "weight")],
        LowestImportance,
        importance_scores={(layer, "weight"): torch.tensor([[1.0, -5.0, 2.0]])},
        amount=1,
    )
    assert layer.weight_mask.tolist() == [[1, 0, 1]]


CONFIG = """
trainer:
  callbacks:
    - class_path: hesscale_lightning.HesScalePruning
      init_args:
        amount:
          class_path: hesscale_lightning.SparsitySchedule
          init_args: {final_sparsity: 0.5, begin_epoch: 0, end_epoch: 0}
        batches: 2
"""


def test_a_config_file_of_the_command_line_names_it(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    model = [
        "--model=hesscale_lightning.HesScaleModule",
        "--model.init_args.net.class_path=hesscale_lightning.networks.MLP",
        "--model.init_args.net.init_args.sizes=[64,8,10]",
        "--model.init_args.optimizer=torch.optim.Adam",
        "--data=hesscale_lightning.DigitsDataModule",
    ]
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"]
    main(["fit", "--config=config.yaml", *model, *quiet, "--trainer.default_root_dir=."])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    parameters = torch.cat([value.flatten() for value in weights.values()])
    assert (parameters == 0).sum() == len(parameters) // 2


BAD = {
    "method": (lambda: HesScalePruning(method="exact"), "Found method='exact', expected one of hesscale,"),
    "a fraction": (lambda: HesScalePruning(1.5), "Found amount=1.5, expected a fraction from 0 to 1"),
    "a number": (lambda: HesScalePruning(-1), "Found amount=-1, expected at least 0"),
    "batches": (lambda: HesScalePruning(batches=0), "Found batches=0, expected at least 1"),
    "units of everything": (lambda: HesScalePruning(pruning_dim=0), "would prune the network's outputs"),
    "a dimension": (
        lambda: fit(m := Quadratic(), HesScalePruning(1, parameters_to_prune=[(m.net, "weight")], pruning_dim=2)),
        r"Found Linear.weight of shape \(1, 6\) for pruning_dim=2, expected",
    ),
    "more than there is": (lambda: fit(Quadratic(), HesScalePruning(8)), "Found amount=8, expected at most the 7"),
    "a sparsity": (lambda: SparsitySchedule(1.0), "Found final_sparsity=1.0, expected at least 0 and less than 1"),
    "epochs": (lambda: SparsitySchedule(0.5, 3, 2), "Found epochs 3 to 2, expected 0 <= begin_epoch"),
    "exponent": (lambda: SparsitySchedule(0.5, exponent=0), "Found exponent=0, expected more than 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_an_error_that_says_what_to_do(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_frozen_parameter_is_refused():
    module = Quadratic()
    module.net.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Found net.bias, which does not require grad.*leave it out"):
        fit(module, HesScalePruning(1))


def test_a_strategy_that_splits_parameters_is_refused():
    class FSDPStrategy:
        pass

    class Trainer:
        strategy = FSDPStrategy()

    with pytest.raises(MisconfigurationException, match="found the strategy FSDPStrategy, which splits"):
        HesScalePruning(1).setup(Trainer(), Quadratic(), "fit")


@pytest.mark.parametrize("amount", [-1, -0.2, True, float("nan"), "half"])
def test_an_amount_that_is_none_is_refused(amount):
    with pytest.raises(ValueError, match="expected a fraction from 0 to 1, or a number of entries"):
        lowest(torch.arange(5.0), amount)


def test_numpy_s_integers_are_numbers_of_entries():
    assert lowest(torch.arange(5.0), numpy.int64(1)).tolist() == [0]
    assert lowest(torch.arange(5.0), numpy.float32(0.4)).tolist() == [0, 1]
