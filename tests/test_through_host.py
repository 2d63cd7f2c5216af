"""Collectives through host memory, which let ranks share a GPU: on the CPU, where nothing need be copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from launching import TRAIN, losses, run

pytestmark = pytest.mark.ranks
HOST = {"ROSA_COLLECTIVES": "host"}

EACH = """
import torch
import torch.distributed as dist
from rosa_ds import distributed, zero

zero.initialize()
assert distributed.backend() == "host"
rank, both = distributed.rank(), [torch.arange(6.0), torch.arange(6.0) + 1]
mine, total = both[rank].clone(), both[0] + both[1]


def reduced(call, *more, **named):
    tensor = mine.clone()
    call(tensor, *more, **named)
    return tensor


assert reduced(dist.all_reduce).equal(total)
assert reduced(dist.all_reduce, op=dist.ReduceOp.AVG).equal(total / 2)
assert reduced(dist.all_reduce, op=dist.ReduceOp.MAX).equal(both[1])
assert reduced(dist.broadcast, src=1).equal(both[1])
onto_one = reduced(dist.reduce, dst=1)
assert rank == 0 or onto_one.equal(total)
whole = torch.empty(12)
dist.all_gather_into_tensor(whole, mine)
assert whole.equal(torch.cat(both))
parts = [torch.empty(6), torch.empty(6)]
dist.all_gather(parts, mine)
assert torch.cat(parts).equal(torch.cat(both))
shares = total.chunk(2)
share = torch.empty(3)
dist.reduce_scatter_tensor(share, mine)
assert share.equal(shares[rank])
dist.reduce_scatter(share, list(mine.chunk(2)), op=dist.ReduceOp.AVG)
assert share.equal(shares[rank] / 2)
assert mine.equal(both[rank])  # what is given stays
work = dist.all_reduce(mine, async_op=True)
work.wait()
assert work.is_completed() and mine.equal(total)
assert distributed.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
with distributed.TrafficCounter() as counter:
    distributed.sum_over_ranks(torch.zeros(5))
assert counter.bytes["all_reduce", torch.float32] == 20
distributed.barrier()
print("all is well")
distributed.leave()
"""


def test_every_collective(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(EACH)
    assert run("fork", 2, str(script), cwd=tmp_path, timeout=100, variables=HOST).count("all is well") == 2


def test_a_training_has_the_losses_that_gloo_gives(tmp_path: Path) -> None:
    given = ["--data.train", "builtin:sql[:8]", "--data.eval", "builtin:sql[:2]", "--ds.train_batch_size", "4"]
    given += ["--training.max_steps", "1", "--mask.warmup_steps", "1", "--ds.zero_optimization.stage", "3"]
    found = []
    for name, variables in (("host", HOST), ("gloo", {})):
        folder = tmp_path / name
        words = [*given, "--training.output_dir", str(folder)]
        run("fork", 2, TRAIN, *words, cwd=tmp_path, timeout=150, variables=variables)
        found.append(losses(folder))
    assert found[0] == found[1]
    assert len(found[0]) > 3
