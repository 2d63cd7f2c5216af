"""A layer's step as a CUDA graph, and a layer through torch.compile, each against the plain one."""

from __future__ import annotations

import torch

from rosa_ds.planning.gpu_check.layer import Layer
from rosa_ds.planning.gpu_check.stage import Check
from rosa_kernels.testing import relative_rms

_REPEATS = 20


def graph(check: Check) -> None:
    """Forward and backward captured and replayed: the same bits, the weight as before, and the time that launching took."""
    layer = Layer.make(1024, 4096, 4096, torch.bfloat16, check.device)
    before, plain = layer.weight.clone(), layer.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made once must be there before the capture
        for _ in range(3):
            layer.step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        again = layer.step()
    captured.replay()
    check.synchronize()
    check.tell(
        unlike=sorted(name for name in plain if not torch.equal(plain[name], again[name])),
        weight_restored=torch.equal(layer.weight, before),
        plain_ms=1e3 * check.seconds(layer.step, _REPEATS),
        replayed_ms=1e3 * check.seconds(captured.replay, _REPEATS),
    )


def compiled(check: Check) -> None:
    """As one graph, forward and backward. On the CPU without the compiler, which takes longer than the stage has."""
    tokens, rows, columns = (4096, 4096, 4096) if check.gpu else (64, 96, 80)
    dtype, backend = (torch.bfloat16, "inductor") if check.gpu else (torch.float32, "aot_eager")
    layer = Layer.make(tokens, rows, columns, dtype, check.device)
    function = torch.compile(layer.forward, fullgraph=True, backend=backend)
    given = [layer.x, layer.A, layer.B, layer.values]

    def step() -> list[torch.Tensor]:
        y = function(layer.x)
        return [y.detach(), *torch.autograd.grad(y, given, layer.grad)]

    plain = layer.step()
    errors = {name: relative_rms(found, wanted) for found, (name, wanted) in zip(step(), plain.items(), strict=True)}
    times = {"plain_ms": 1e3 * check.seconds(layer.step, _REPEATS), "compiled_ms": 1e3 * check.seconds(step, _REPEATS)}
    check.tell(backend=backend, dtype=str(dtype), **{f"error of {name}": e for name, e in errors.items()}, **times)
