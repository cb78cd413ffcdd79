"""HesScaleModule trains any network with any loss, metrics and optimizer."""

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanAbsoluteError

from hesscale_lightning import AdaHesScale, DigitsDataModule, HesScaleCallback, HesScaleModule
from hesscale_lightning.command_line.networks import MLP, ConvNet
from tests.lightning_models import ListLogger, make_batches, make_loader, make_net, make_trainer


def accuracy() -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes=10, average="micro")


@pytest.mark.parametrize(
    ("net", "shape"),
    [(lambda: MLP([64, 32, 10]), "flat"), (lambda: ConvNet(1, [8, 16], 10, nn.ReLU), "image")],
)
def test_it_learns_the_digits_with_the_default_optimizer(net, shape):
    torch.manual_seed(0)
    module = HesScaleModule(net(), metrics={"accuracy": accuracy()})
    data = DigitsDataModule(shape)
    trainer = make_trainer(HesScaleCallback(), max_epochs=3)
    before = trainer.validate(module, data, verbose=False)[0]
    trainer.fit(module, data)
    after = trainer.validate(module, data, verbose=False)[0]
    assert after["val/loss"] < 0.6 * before["val/loss"]
    assert after["val/accuracy"] > 0.7 > before["val/accuracy"]


def test_the_default_optimizer_is_adahesscale_over_the_parameters_that_are_not_frozen():
    net = make_net()
    net[0].requires_grad_(False)
    optimizer = HesScaleModule(net).configure_optimizers()
    assert isinstance(optimizer, AdaHesScale)
    assert optimizer.param_groups[0]["params"] == list(net[3].parameters())


def test_the_schedule_changes_the_learning_rate_each_epoch():
    module = HesScaleModule(
        make_net(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5),
    )
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, make_loader(make_batches(2)))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.025)


def test_evaluation_reports_the_loss_and_every_metric_of_the_whole_set():
    batches = make_batches(3)
    module = HesScaleModule(make_net(), metrics={"accuracy": MulticlassAccuracy(num_classes=3, average="micro")})
    trainer = make_trainer()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    prediction = module(x)
    expected = {
        "loss": nn.functional.cross_entropy(prediction, y).item(),
        "accuracy": (prediction.argmax(1) == y).float().mean().item(),
    }
    for stage, run in (("val", trainer.validate), ("test", trainer.test)):
        found = run(module, make_loader(batches), verbose=False)[0]
        assert found == {f"{stage}/{name}": pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_any_loss_and_metric_will_do():
    class Regression(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full((6,), index / 8), torch.full((3,), 1.0)

    logger = ListLogger()
    module = HesScaleModule(make_net(), loss=nn.MSELoss(), metrics={"error": MeanAbsoluteError()})
    trainer = make_trainer(HesScaleCallback(), max_epochs=20, logger=logger, log_every_n_steps=1)
    trainer.fit(module, torch.utils.data.DataLoader(Regression(), batch_size=4))
    losses = [record["train/loss"] for _, record in logger.records if "train/loss" in record]
    assert losses[-1] < 0.5 * losses[0]


def test_prediction_takes_inputs_with_or_without_targets():
    module = HesScaleModule(make_net())
    batches = make_batches(2)
    x = torch.cat([x for x, _ in batches])
    with_targets = make_trainer().predict(module, make_loader(batches))
    without = make_trainer().predict(module, torch.utils.data.DataLoader(x, batch_size=4))
    with torch.no_grad():
        expected = module.net(x)
    assert torch.equal(torch.cat(with_targets), expected)
    assert torch.equal(torch.cat(without), expected)


def test_a_checkpoint_loads_with_weights_only(tmp_path):
    module = HesScaleModule(make_net())
    trainer = make_trainer(HesScaleCallback())
    trainer.fit(module, make_loader(make_batches(2)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.manual_seed(9)
    loaded = HesScaleModule.load_from_checkpoint(
        tmp_path / "last.ckpt", weights_only=True, net=nn.Sequential(*make_net())
    )
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), module.parameters(), strict=True))
    assert loaded.net is not module.net


def test_an_mlp_needs_an_input_and_an_output():
    with pytest.raises(ValueError, match=r"sizes=\[3\], expected at least two"):
        MLP([3])
