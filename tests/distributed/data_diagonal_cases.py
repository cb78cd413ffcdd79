"""Run by two processes: the diagonal over a data set, each with its own part, against one process with all the data."""

from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hesscale_lightning import HesScalePruning, HessDiagState, hess_diag_over
from tests.distributed.launching import DEVICE, begin, run_cases
from tests.lightning_models import Classifier, make_batches, make_loader, make_net, make_trainer

PARTS = [[slice(0, 5), slice(5, 9), slice(9, 10)], [slice(10, 17)]]  # batches of unequal number and size


def problem():
    """A network with a parameter that one process alone uses, its loss, all batches, and this process's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    net.register_parameter("of_one_process", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    x, y = torch.randn(17, 6, dtype=torch.float64), torch.randint(3, (17,))

    def step(model, batch):
        used = (model.of_one_process**2).sum() if len(batch[0]) == 7 else 0.0
        return cross_entropy(nn.Sequential(*model.children())(batch[0]), batch[1]) + used

    batches = [[(x[part], y[part]) for part in parts] for parts in PARTS]
    return net.to(DEVICE), step, batches[0] + batches[1], batches[dist.get_rank()]


def worst(found, expected):
    return max(((found[name] - h).abs().max() / h.abs().max()).item() for name, h in expected.items())


def over_parts(how, reduction, dtype):
    """In one call, wrapped for training, or resumed after one batch."""
    net, step, everything, own = problem()
    options = {"step": step, "reduction": reduction, "progress_bar": False, "dtype": dtype}
    expected = hess_diag_over(net, None, everything, distributed=False, **options)
    if how == "wrapped":
        net = DistributedDataParallel(net)
    state = HessDiagState()
    if how == "resumed":
        hess_diag_over(net, None, own, batches=1, state=state, distributed=False, **options)
    error = worst(hess_diag_over(net, None, own, state=state, **options), expected)
    assert all(p.grad is None for p in net.parameters())
    return error


def pruned_together():
    """Two processes of a Trainer prune what one would by the diagonal of all samples."""
    batches = make_batches(6, size=8, dtype=torch.float64)
    module = Classifier(make_net(dtype=torch.float64), partial(torch.optim.SGD, lr=0.0))
    options = {"progress_bar": False, "distributed": False}
    costs = hess_diag_over(module.to(DEVICE), None, batches, **options)
    costs = torch.cat([(costs[n].clamp(min=0) * p**2).flatten() for n, p in module.named_parameters()])
    pruning = HesScalePruning(30, make_pruning_permanent=False)
    trainer = make_trainer(pruning, accelerator=DEVICE, devices=2, strategy="ddp", max_epochs=1)
    trainer.fit(module, make_loader(batches))
    masks = [(name, mask) for name, mask in module.named_buffers() if name.endswith("_mask")]
    names = [name.removesuffix("_orig") for name, _ in module.named_parameters()]
    order = sorted(masks, key=lambda pair: names.index(pair[0].removesuffix("_mask")))
    found = torch.cat([mask.flatten() for _, mask in order])
    expected = torch.ones_like(costs)
    expected[costs.argsort()[:30]] = 0
    return (found.to(expected) - expected).abs().sum().item()


CASES = {
    f"the diagonal over a data set, {how}, {reduction}, {dtype}": partial(over_parts, how, reduction, dtype)
    for how, reduction, dtype in product(
        ("whole", "wrapped", "resumed"), ("mean", "sum"), (torch.float64, torch.float32)
    )
}
CASES["HesScalePruning under DDP"] = pruned_together

if __name__ == "__main__":
    begin()
    run_cases(CASES)
