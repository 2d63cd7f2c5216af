"""Whether a GPU and the CPU quantise to the same bits, and read the same numbers from them."""

from __future__ import annotations

import importlib.util

import torch

from rosa_ds.models.quantized import PACKED, SCALES, Form, Kind
from rosa_ds.planning.gpu_check.stage import Check, NotRunError, randn

FORMS: tuple[tuple[Kind, bool], ...] = (("nf4", True), ("nf4", False), ("int8", False))
_SHAPE = (512, 1088)


def differences(form: Form, device: torch.device) -> dict[str, int | float]:
    """Of a matrix that the CPU and ``device`` quantise: how many bytes and numbers differ, and the largest difference."""
    weight = 0.02 * randn(*form.shape, dtype=torch.float32, device=torch.device("cpu"))
    here, there = form.pack(weight), {name: part.cpu() for name, part in form.pack(weight.to(device)).items()}
    dense = form.unpack(here[PACKED], here[SCALES])
    same_bits = form.unpack(here[PACKED].to(device), here[SCALES].to(device)).cpu()
    return {
        "packed bytes that differ": int((here[PACKED] != there[PACKED]).sum()),
        "scale bytes that differ": int((here[SCALES] != there[SCALES]).sum()),
        "numbers that differ, of the same bits": int((dense != same_bits).sum()),
        "largest": float((dense.double() - same_bits.double()).abs().max()),
        "of": form.numel,
    }


def compare(check: Check) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotRunError("needs bitsandbytes: pip install 'bitsandbytes>=0.49'")
    for kind, double in FORMS:
        for dtype in (torch.float32, torch.bfloat16):
            found = differences(Form(kind, double, _SHAPE, dtype), check.device)
            check.tell(kind=kind, double=double, dtype=str(dtype), **found)
