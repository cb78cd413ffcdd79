"""A LightningModule around any network, loss, metrics and optimizer, so that a config file can describe a whole run."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from hesscale_lightning.optim import AdaHesScale
from hesscale_lightning.optim.sharded import is_distributed
from hesscale_lightning.trainer.compiled_training import CompiledStepMixin


class HesScaleModule(CompiledStepMixin):
    """Trains a network on batches of inputs and targets.

    Logs ``train/loss`` on every step; ``val/loss`` and ``test/loss`` with each metric (``val/accuracy``) every epoch.

    Args:
        net: the network; maps a batch of inputs to predictions.
        loss: maps predictions and targets to a scalar. The default is cross-entropy.
        metrics: metrics to evaluate on validation and test data, by the name to log them under.
        optimizer: builds the optimizer from the parameters: a class, or a function of the parameters. The default is
            AdaHesScale; it needs HesScaleCallback among the trainer's callbacks.
        lr_scheduler: builds a learning rate schedule, stepped once per epoch, from the optimizer. The default is none.
        compile_step: run the training step as one compiled program (see CompiledStepMixin); worth its 5 to 60 seconds
            of compiling for small networks on one device.

    Example:
        >>> from torch import nn
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        >>> module = HesScaleModule(net, metrics={"accuracy": MulticlassAccuracy(num_classes=10)})
        >>> type(module.configure_optimizers()).__name__
        'AdaHesScale'

    In a checkpoint there are the weights only, not how the network is built: load it with
    ``HesScaleModule.load_from_checkpoint(path, net=net)``, or with ``--ckpt_path`` and the config on the command line.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: nn.Module | None = None,
        metrics: Mapping[str, Metric] | None = None,
        optimizer: OptimizerCallable = AdaHesScale,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile_step: bool = False,
    ) -> None:
        super().__init__()
        self.compile_step = compile_step
        self.net = net
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        collection = MetricCollection(dict(metrics or {}))
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler

    def configure_model(self) -> None:
        """Under ModelParallelStrategy, split every layer of the network between the processes (``fully_shard``).

        Raises:
            MisconfigurationException: With ``tensor_parallel_size`` above 1: how a network's products are to be split,
                only a module of your own can say.
        """
        mesh = self.device_mesh
        if mesh is None or any(is_distributed(p) for p in self.net.parameters()):
            return
        if mesh["tensor_parallel"].size() > 1:
            raise MisconfigurationException(
                f"HesScaleModule found tensor_parallel_size={mesh['tensor_parallel'].size()}, expected 1: it splits "
                "parameters with fully_shard alone. Set data_parallel_size to the number of processes, or override "
                "configure_model and call parallelize_module there."
            )
        from torch.distributed.fsdp import fully_shard

        for layer in self.net.modules():
            if layer is not self.net and list(layer.parameters(recurse=False)):
                fully_shard(layer, mesh=mesh["data_parallel"])
        fully_shard(self.net, mesh=mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        """Predict.

        Args:
            x: a batch of inputs.

        Returns:
            The network's predictions.
        """
        prediction: Tensor = self.net(x)
        return prediction

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        loss: Tensor = self.loss(self(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Evaluate a validation batch."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Evaluate a test batch."""
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the predictions for a batch of inputs, with or without targets."""
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        prediction: Tensor = self(x)
        return prediction

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over all parameters that are not frozen, and its schedule."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, metrics: MetricCollection) -> None:
        x, y = batch
        prediction = self(x)
        self.log(f"{stage}/loss", self.loss(prediction, y), batch_size=len(x), prog_bar=True)
        metrics.update(prediction, y)
        self.log_dict(metrics, batch_size=len(x), prog_bar=True)
