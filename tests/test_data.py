"""The data modules deliver each sample once, split by the seed alone and standardised by the training part."""

import random

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, DistributedSampler

from hesscale_lightning import DigitsDataModule, MNIST1DDataModule
from hesscale_lightning.command_line.data import BatchedTensorDataset, InMemoryDataModule, already_a_batch


def ready(module: InMemoryDataModule) -> InMemoryDataModule:
    module.setup()
    return module


def parts(module: InMemoryDataModule) -> list[torch.Tensor]:
    return [dataset.tensors[0] for dataset in (module.train_set, module.val_set, module.test_set)]


def test_the_three_parts_of_the_digits_hold_every_digit_once():
    data = ready(DigitsDataModule(val_fraction=0.15, test_fraction=0.2))
    train, val, test = parts(data)
    assert (len(train), len(val), len(test)) == (1168, 270, 359)
    pixels, _ = load_digits(return_X_y=True)
    found = torch.cat([train, val, test]).numpy()
    found = found * (pixels.std() / found.std())
    found = np.round(found - found.min()).astype(int)
    assert sorted(map(tuple, found)) == sorted(map(tuple, pixels.astype(int)))


@pytest.mark.parametrize("make", [DigitsDataModule, lambda **kwargs: MNIST1DDataModule(num_samples=200, **kwargs)])
def test_the_training_part_has_mean_zero_and_deviation_one(make):
    train = parts(ready(make(seed=3)))[0]
    assert train.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.std().item() == pytest.approx(1, abs=1e-5)


def test_the_seed_alone_decides_the_split():
    torch.manual_seed(1)
    first = parts(ready(DigitsDataModule(seed=5)))
    torch.manual_seed(2)
    second = parts(ready(DigitsDataModule(seed=5)))
    other = parts(ready(DigitsDataModule(seed=6)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_mnist1d_repeats_with_its_seed_and_leaves_the_global_generators_alone():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = parts(ready(MNIST1DDataModule(num_samples=200, seed=5)))
    assert (random.random(), np.random.rand(), torch.rand(())) == expected
    second = parts(ready(MNIST1DDataModule(num_samples=200, seed=5)))
    other = parts(ready(MNIST1DDataModule(num_samples=200, seed=6)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (DigitsDataModule, "flat", (64,)),
        (DigitsDataModule, "image", (1, 8, 8)),
        (MNIST1DDataModule, "flat", (40,)),
        (MNIST1DDataModule, "channel", (1, 40)),
        (MNIST1DDataModule, "sequence", (40, 1)),
    ],
)
def test_samples_have_the_shape_asked_for(make, shape, expected):
    sizes = {"num_samples": 200} if make is MNIST1DDataModule else {}
    data = ready(make(shape=shape, batch_size=16, **sizes))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        x, y = next(iter(loader))
        assert x.shape[1:] == expected
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert y.min() >= 0
        assert y.max() <= 9


def test_an_epoch_visits_each_training_sample_once_in_another_order_each_time():
    data = ready(DigitsDataModule(batch_size=100))
    epochs = [torch.cat([x for x, _ in data.train_dataloader()]) for _ in range(2)]
    assert not torch.equal(*epochs)
    whole = {tuple(row) for row in data.train_set.tensors[0].tolist()}
    assert all({tuple(row) for row in epoch.tolist()} == whole for epoch in epochs)


def test_whole_batches_equal_stacked_samples_also_under_a_distributed_sampler():
    x, y = torch.arange(14).view(7, 2), torch.arange(7)
    dataset = BatchedTensorDataset(x, y)
    for sampler in (None, DistributedSampler(dataset, num_replicas=2, rank=1, shuffle=False)):
        ours = DataLoader(dataset, batch_size=3, sampler=sampler, collate_fn=already_a_batch)
        plain = DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3, sampler=sampler)
        for our, their in zip(ours, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(our, their, strict=True))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (DigitsDataModule, {"shape": "square"}, "shape='square', expected 'flat' or 'image'"),
        (MNIST1DDataModule, {"shape": "image"}, "shape='image', expected 'flat', 'channel' or 'sequence'"),
        (MNIST1DDataModule, {"num_samples": 3}, "num_samples=3, expected at least 10"),
        (DigitsDataModule, {"val_fraction": 0.5, "test_fraction": 0.5}, "sum below 1"),
        (DigitsDataModule, {"test_fraction": 0.0}, "both above 0"),
    ],
)
def test_wrong_arguments_are_named(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_asking_for_batches_before_setup_says_so():
    with pytest.raises(RuntimeError, match="call setup\\(\\) first"):
        DigitsDataModule().train_dataloader()
