"""Small real data sets that need no download, as LightningDataModules with seeded splits.

Every data set is one pair of tensors in memory, split into train, validation and test by a seed, and standardised with
the mean and deviation of its training part.
"""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class BatchedTensorDataset(TensorDataset):
    """A TensorDataset that fetches a whole batch by one indexing operation instead of one sample at a time.

    On data sets of this size, fetching and stacking single samples would take longer than the training step. Use it
    with ``DataLoader(dataset, collate_fn=already_a_batch)``.

    Example:
        >>> dataset = BatchedTensorDataset(torch.arange(6).view(3, 2), torch.tensor([0, 1, 0]))
        >>> next(iter(DataLoader(dataset, batch_size=2, collate_fn=already_a_batch)))
        (tensor([[0, 1], [2, 3]]), tensor([0, 1]))
    """

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the samples at ``indices``, stacked."""
        index = torch.as_tensor(indices)
        return tuple(tensor[index] for tensor in self.tensors)


def already_a_batch(batch: Any) -> Any:
    """Pass a batch of :class:`BatchedTensorDataset` through, in place of stacking samples."""
    return batch


class InMemoryDataModule(pl.LightningDataModule):
    """What the data modules share: seeded split, standardisation, loaders. A subclass says what the data is.

    Args:
        batch_size: samples in a batch, of each process.
        val_fraction: share of all samples for validation.
        test_fraction: share of all samples for the test.
        seed: seed of the split; the same seed gives the same split on every machine.
        num_workers: worker processes of the loaders; 0 is fastest, since all data is in memory.

    Raises:
        ValueError: if the fractions leave nothing to train on.
    """

    def __init__(
        self,
        batch_size: int = 32,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if val_fraction <= 0 or test_fraction <= 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f"Found val_fraction={val_fraction} and test_fraction={test_fraction}, expected both above 0 and their "
                "sum below 1, so that something is left to train on."
            )
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.train_set: BatchedTensorDataset | None = None
        self.val_set: BatchedTensorDataset | None = None
        self.test_set: BatchedTensorDataset | None = None

    def load(self) -> tuple[Tensor, Tensor]:
        """Return all inputs (float32, samples first) and all targets; a subclass provides it."""
        raise NotImplementedError(f"{type(self).__name__} must define load()")

    def setup(self, stage: str | None = None) -> None:
        """Load, split and standardise, once."""
        if self.train_set is not None:
            return
        x, y = self.load()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        test_size, val_size = round(len(x) * self.test_fraction), round(len(x) * self.val_fraction)
        test, val, train = order.split([test_size, val_size, len(x) - test_size - val_size])
        # One mean and one deviation for all pixels: some pixels of the digits never change.
        x = (x - x[train].mean()) / x[train].std()
        self.train_set, self.val_set, self.test_set = (
            BatchedTensorDataset(x[part], y[part]) for part in (train, val, test)
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test batches, to predict on."""
        return self._loader(self.test_set)

    def _loader(self, dataset: BatchedTensorDataset | None, shuffle: bool = False) -> DataLoader[Any]:
        if dataset is None:
            raise RuntimeError(
                f"{type(self).__name__} has no data yet: call setup() first; a Trainer does it by itself."
            )
        return DataLoader(
            dataset,
            batch_size=self.batch_size if shuffle else 8 * self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=already_a_batch,
        )


class DigitsDataModule(InMemoryDataModule):
    """1,797 handwritten digits of 8 x 8 pixels in 10 classes, embedded in scikit-learn.

    Args:
        shape: ``flat`` for samples of shape (64,), ``image`` for (1, 8, 8).
        batch_size: samples in a batch, of each process.
        val_fraction: share of all samples for validation.
        test_fraction: share of all samples for the test.
        seed: seed of the split; the same seed gives the same split on every machine.
        num_workers: worker processes of the loaders; 0 is fastest, since all data is in memory.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> data = DigitsDataModule(shape="image", batch_size=16)
        >>> data.setup()
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, y.shape
        (torch.Size([16, 1, 8, 8]), torch.Size([16]))

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
    1998.
    """

    def __init__(
        self,
        shape: Literal["flat", "image"] = "flat",
        batch_size: int = 32,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, val_fraction, test_fraction, seed, num_workers)
        if shape not in ("flat", "image"):
            raise ValueError(f"Found shape={shape!r}, expected 'flat' or 'image'.")
        self.shape = shape

    def load(self) -> tuple[Tensor, Tensor]:
        """Return the pixels, 0 to 16, and the classes."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "The digits come with scikit-learn: pip install 'hesscale_lightning[examples]'"
            ) from error
        pixels, classes = load_digits(return_X_y=True)
        x = torch.as_tensor(pixels, dtype=torch.float32)
        return (x.view(-1, 1, 8, 8) if self.shape == "image" else x), torch.as_tensor(classes, dtype=torch.int64)


class MNIST1DDataModule(InMemoryDataModule):
    """MNIST-1D: digit-like signals of length 40 in 10 classes, drawn by a seeded procedure.

    Args:
        shape: ``flat`` for samples of shape (40,), ``channel`` for (1, 40), ``sequence`` for (40, 1).
        num_samples: samples to draw, in all three parts together.
        batch_size: samples in a batch, of each process.
        val_fraction: share of all samples for validation.
        test_fraction: share of all samples for the test.
        seed: seed of the samples and of the split.
        num_workers: worker processes of the loaders; 0 is fastest, since all data is in memory.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> data = MNIST1DDataModule(shape="channel", num_samples=200, batch_size=16)
        >>> data.setup()
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, y.shape
        (torch.Size([16, 1, 40]), torch.Size([16]))

    Source: S. Greydanus and D. Kobak, "Scaling Down Deep Learning with MNIST-1D", ICML 2024.
    """

    def __init__(
        self,
        shape: Literal["flat", "channel", "sequence"] = "flat",
        num_samples: int = 5000,
        batch_size: int = 64,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        seed: int = 42,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, val_fraction, test_fraction, seed, num_workers)
        if shape not in ("flat", "channel", "sequence"):
            raise ValueError(f"Found shape={shape!r}, expected 'flat', 'channel' or 'sequence'.")
        if num_samples < 10:
            raise ValueError(f"Found num_samples={num_samples}, expected at least 10: one of each class.")
        self.shape = shape
        self.num_samples = num_samples

    def load(self) -> tuple[Tensor, Tensor]:
        """Draw the signals and return them with their classes."""
        try:
            from mnist1d.data import get_dataset_args, make_dataset
        except ImportError as error:
            raise ImportError("MNIST-1D needs its generator: pip install 'hesscale_lightning[examples]'") from error
        arguments = get_dataset_args()
        arguments.num_samples = self.num_samples
        arguments.seed = self.seed
        with isolate_rng():  # the generator seeds Python's and numpy's global generators
            drawn = make_dataset(arguments)
        signals = torch.cat([torch.as_tensor(drawn[part], dtype=torch.float32) for part in ("x", "x_test")])
        classes = torch.cat([torch.as_tensor(drawn[part], dtype=torch.int64) for part in ("y", "y_test")])
        if self.shape == "channel":
            signals = signals.unsqueeze(1)
        elif self.shape == "sequence":
            signals = signals.unsqueeze(2)
        return signals, classes


class DiabetesDataModule(InMemoryDataModule):
    """442 patients with 10 measurements and the progression of their diabetes after a year, embedded in scikit-learn.

    Measurements and targets are standardised.

    Args:
        batch_size: samples in a batch, of each process.
        val_fraction: share of all samples for validation.
        test_fraction: share of all samples for the test.
        seed: seed of the split; the same seed gives the same split on every machine.
        num_workers: worker processes of the loaders; 0 is fastest, since all data is in memory.

    Example:
        >>> data = DiabetesDataModule(batch_size=16)
        >>> data.setup()
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, y.shape
        (torch.Size([16, 10]), torch.Size([16]))

    Source: Efron, Hastie, Johnstone, Tibshirani, "Least Angle Regression", Annals of Statistics, 2004.
    """

    def load(self) -> tuple[Tensor, Tensor]:
        """Return the measurements, each with the same mean and deviation, and the progression."""
        try:
            from sklearn.datasets import load_diabetes
        except ImportError as error:
            raise ImportError(
                "The diabetes data come with scikit-learn: pip install 'hesscale_lightning[examples]'"
            ) from error
        x, y = load_diabetes(return_X_y=True)
        return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32)

    def setup(self, stage: str | None = None) -> None:
        """Load, split and standardise, once, the targets too."""
        loaded = self.train_set is not None
        super().setup(stage)
        if loaded or self.train_set is None:
            return
        mean, deviation = self.train_set.tensors[1].mean(), self.train_set.tensors[1].std()
        self.train_set, self.val_set, self.test_set = (
            BatchedTensorDataset(part.tensors[0], (part.tensors[1] - mean) / deviation)
            for part in (self.train_set, self.val_set, self.test_set)
            if part is not None
        )
