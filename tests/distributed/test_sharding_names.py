"""What is read of FSDP2 and missing is named where fully_shard is used, and nothing else fails."""

import subprocess
import sys

_TRAIN = """
import torch
from hesscale_lightning import AdaHesScale, attach
net = torch.nn.Linear(3, 2)
optimizer = AdaHesScale(net.parameters())
loss = net(torch.ones(4, 3)).square().mean()
attach(loss)
loss.backward()
optimizer.step()
"""
_BLOCK = "import sys; sys.modules['torch.distributed._composable_state'] = None\n"
_SHARD = """
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
net = torch.nn.Sequential(torch.nn.Linear(3, 2))
fully_shard(net)
shards = list(net.parameters())
loss = net(torch.ones(4, 3)).square().mean()
try:
    attach(loss, shards)
except Exception as error:
    print(type(error).__name__, error)
else:
    loss.backward()
    print("diagonals", [p.hess_diag.shape for p in shards])
dist.destroy_process_group()
"""


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    return done.stdout + done.stderr if done.returncode else done.stdout


def test_plain_training_needs_no_name_of_fully_shard() -> None:
    assert _run(_BLOCK + _TRAIN) == ""


def test_a_missing_name_of_fully_shard_is_told_where_it_is_used() -> None:
    assert "diagonals [torch.Size([2, 3]), torch.Size([2])]" in _run(_TRAIN + _SHARD)
    # What fully_shard itself imports is hidden from this package alone.
    hidden = "import torch.distributed.fsdp\nimport torch.distributed._composable_state as names\n"
    hidden += "kept = vars(names).pop('_module_state_mapping')\nimport hesscale_lightning.curvature\n"
    hidden += "names._module_state_mapping = kept\n"
    printed = _run(hidden + _TRAIN + _SHARD)
    assert "ImportError hesscale_lightning needs torch.distributed._composable_state._module_state_mapping" in printed


def test_a_missing_attribute_of_a_group_is_told() -> None:
    code = "import hesscale_lightning.curvature.sharding_names as names; names._OF_GROUP += ('is_round',)\n"
    printed = _run(code + _TRAIN + _SHARD)
    assert "ImportError hesscale_lightning needs FSDPParamGroup.is_round for modules under fully_shard" in printed
