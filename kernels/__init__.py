"""Operations of sparse and low-rank adapters on a linear layer. Import as ``rosa_kernels``.

Shapes everywhere: ``T`` tokens (batch × length, flattened), ``M`` in-features, ``N`` out-features, ``R`` rank,
``Z`` stored entries of the sparse part. A suffix of a name is its logical shape: ``grad_TN`` is (T, N).
"""

if __name__ == "kernels":
    # Python was started in the repository's root, and something imports the Hugging Face package ``kernels``
    # (transformers does). Give the name back: to that package where it is installed, else to an empty module.
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
else:
    from rosa_kernels.adapter_linear.op import adapter_linear
    from rosa_kernels.dispatch import explain
    from rosa_kernels.pattern.plan import Plan, make_plan
    from rosa_kernels.scatter.op import restore_into, scatter_add_into, scattered
    from rosa_kernels.sddmm.op import sddmm
    from rosa_kernels.spmm.op import spmm_add_into

    __all__ = [
        "Plan",
        "adapter_linear",
        "explain",
        "make_plan",
        "restore_into",
        "scatter_add_into",
        "scattered",
        "sddmm",
        "spmm_add_into",
    ]
