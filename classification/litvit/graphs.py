"""What is asked where a graph is made of a model: whether it leaves torch, and whether it is for other sizes too."""

import torch


def is_exporting() -> bool:
    """Return whether torch.export or torch.onnx makes a graph, which runtimes other than torch may run.

    torch.export says so since torch 2.7.
    """
    if torch.jit.is_tracing():  # also by torch.onnx.export(dynamo=False)
        return torch.onnx.is_in_onnx_export()
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def are_static(*sizes: int | torch.SymInt) -> bool:
    """Return whether no graph is being made that is for other sizes too.

    torch.compile and torch.export say which sizes are left open. For torch.onnx.export(dynamo=False) all may be.
    """
    if not torch.compiler.is_compiling():
        return not (torch.jit.is_tracing() and is_exporting())
    try:
        from torch.fx.experimental.symbolic_shapes import has_static_value
    except ImportError:  # in older torch
        return False
    return all(has_static_value(size) for size in sizes)
