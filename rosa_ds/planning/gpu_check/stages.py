"""The stages in the order in which they run: what most depends on comes first."""

from __future__ import annotations

from rosa_ds.planning.gpu_check.stage import Stage

_HERE = "rosa_ds.planning.gpu_check"

STAGES = (
    Stage("environment", f"{_HERE}.environment:look", 25, "versions, GPUs, driver, clocks"),
    Stage("kernels", f"{_HERE}.kernels:test", 120, "the kernels against float64"),
    Stage("quantised", f"{_HERE}.quantised:compare", 20, "nf4 and int8 numbers of GPU and CPU, bit for bit", gpu=True),
    Stage("determinism", f"{_HERE}.determinism:repeat", 25, "one step of a layer and of attention, again and again"),
    Stage(
        "steps", f"{_HERE}.steps:measure", 110, "steps of 1B and 8B layers against PEFT's LoRA, peak against the plan"
    ),
    Stage("roofline", f"{_HERE}.roofline:measure", 50, "the kernels' time against that of copies and products here"),
    Stage("resume", f"{_HERE}.resume:compare", 70, "a run that is resumed against one that went straight on"),
    Stage("ranks", f"{_HERE}.ranks:train", 70, "2 and 4 ranks on one GPU, through host memory"),
    Stage("graph", f"{_HERE}.capture:graph", 25, "a layer captured as a CUDA graph", gpu=True),
    Stage("compile", f"{_HERE}.capture:compiled", 45, "a layer through torch.compile"),
    Stage("sanitizer", f"{_HERE}.sanitizer:examine", 40, "compute-sanitizer on every kernel", gpu=True),
)
