"""Losses in blocks against losses of whole logits, on several ranks; started by test_head.py. Argument: a folder with its models."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

import engines
from rosa_ds import distributed, zero
from rosa_ds.config.deepspeed import plan_deepspeed
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.batches import collate
from rosa_ds.data.tokenise import Tokens
from rosa_ds.models.head import BlockedHead
from rosa_ds.models.loss import find_head_with, target_losses, token_loss_sum, use_head
from rosa_ds.zero.engine import forget_order

FOLDER = Path(sys.argv[1])
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "frozen, tied": ("tied", {}),
    "trained": ("llama", {"modules_to_save": ["lm_head"]}),
    "adapted": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
}


def compare(stage: int, kind: str) -> None:
    model_name, adapter = KINDS[kind]
    given = RunConfig(
        model={"name_or_path": str(FOLDER / model_name), "dtype": "float32"},
        adapter={"rank": 3, "density": 0.05, "dropout": 0.0, **adapter},
    )
    section = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    made, given = plan_deepspeed({"zero_optimization": section}, given, distributed.world_size(), False)
    model, engine, _ = engines.make_engine(given, made)
    device = engine.device
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(distributed.rank())).tolist()
    # one block more on the second rank
    firsts = (1, 6) if distributed.rank() else (5, 6)
    batch = collate([Tokens(row, [n > first for n in range(11)]) for row, first in zip(ids, firsts, strict=True)], 0)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.eval()
    head = find_head_with(engine, batch, device, 3)
    assert isinstance(head, BlockedHead), head
    losses = []
    for used in (None, head):
        use_head(model, used)
        losses.append(target_losses(engine, batch, device))
    assert torch.allclose(*losses, rtol=1e-6, atol=1e-6)
    forget_order(engine)

    gathered: list[int] = []

    def step(used: BlockedHead | None) -> tuple[Tensor, dict[str, Tensor]]:
        use_head(model, used)
        engine.train()
        with distributed.TrafficCounter() as counter:
            loss = token_loss_sum(engine, batch, device)
            engine.backward(loss)
        gathered.append(sum(size for (name, _), size in counter.bytes.items() if "gather" in str(name)))
        grads = {name: safe_get_full_grad(p) for name, p in model.named_parameters() if p.requires_grad}
        engine.step()
        return loss.detach(), {name: grad.clone() for name, grad in grads.items() if grad is not None}

    whole, expected = step(None)
    step(None)
    for _ in range(2):
        blocks, found = step(head)
        assert torch.allclose(blocks, whole, rtol=1e-6), (blocks, whole)
        assert found.keys() == expected.keys()
        assert found
        for name, gradient in expected.items():
            assert gradient.any() or name.endswith((".A", "values")), name
            assert float((found[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)) < 1e-6, name
    # stage 3 learns the order of a step from the first, and gathers once, for all blocks, what it keeps until backward
    assert gathered[1] == gathered[2] == gathered[3], gathered
    if stage == 3:
        numbers = sum(zero.full_numel(p) for p in model.parameters())
        assert gathered[3] <= 4 * numbers + 4 * distributed.world_size() * len(list(model.parameters())), (
            gathered,
            numbers,
        )
    if distributed.is_main():
        sys.stdout.write(f"equal {stage} {kind}\n")


def main() -> None:
    zero.initialize()
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("WARNING")
    for stage, kind in ((0, "trained"), (2, "trained"), (2, "adapted"), *((3, kind) for kind in KINDS)):
        torch.manual_seed(0)
        compare(stage, kind)
    distributed.leave()


if __name__ == "__main__":
    main()
