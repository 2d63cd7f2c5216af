"""Operations of sparse and low-rank adapters on a linear layer. Import as ``rosa_kernels``.

Shapes everywhere: ``T`` tokens (batch × length, flattened), ``M`` in-features, ``N`` out-features, ``R`` rank,
``Z`` stored entries of the sparse part. A suffix of a name is its logical shape: ``grad_TN`` is (T, N).
"""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package `rosa_kernels`; as `kernels` it would shadow the Hugging Face package of that "
        "name. Run from another folder, or use `pytest` instead of `python -m pytest`"
    )

from rosa_kernels.adapter_linear.op import adapter_linear
from rosa_kernels.scatter.op import scattered
from rosa_kernels.sddmm.op import sddmm

__all__ = ["adapter_linear", "scattered", "sddmm"]
