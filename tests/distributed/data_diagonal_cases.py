"""The diagonal over a data set on two processes, against one process with all the data. Prints the largest error."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hesscale_lightning import HessDiagState, hess_diag_over


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    net.register_parameter("of_one_process", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    x, y = torch.randn(17, 6, dtype=torch.float64), torch.randint(3, (17,))
    parts = [[slice(0, 5), slice(5, 9), slice(9, 10)], [slice(10, 17)]]  # batches of unequal number and size

    def step(model, batch):
        used = (model.of_one_process**2).sum() if len(batch[0]) == 7 else 0.0
        return cross_entropy(nn.Sequential(*model.children())(batch[0]), batch[1]) + used

    everything = [(x[part], y[part]) for part in parts[0] + parts[1]]
    own = [(x[part], y[part]) for part in parts[rank]]
    wrapped = DistributedDataParallel(net)
    before = [p.grad for p in net.parameters()]
    for reduction in ("mean", "sum"):
        for dtype in (None, torch.float32):
            options = {"step": step, "reduction": reduction, "progress_bar": False, "dtype": dtype}
            expected = hess_diag_over(net, None, everything, distributed=False, **options)
            whole = hess_diag_over(wrapped, None, own, **options)
            state = HessDiagState()
            hess_diag_over(net, None, own, batches=1, state=state, distributed=False, **options)
            resumed = hess_diag_over(net, None, own, state=state, **options)
            for name, h in expected.items():
                scale = h.abs().max()
                worst = max(((found[name] - h).abs().max() / scale).item() for found in (whole, resumed))
                print(f"{rank} {reduction} {dtype} {name}\t{worst}", flush=True)  # noqa: T201
    assert before == [p.grad for p in net.parameters()]
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
