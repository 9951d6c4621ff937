"""torchvision beside a PyTorch that its compiled operators do not fit."""

import importlib
import sys
from typing import Any

_declared: list[Any] = []  # kept alive: PyTorch forgets the operators of a library that nobody holds


def import_torchvision() -> Any:
    """torchvision, which pytorch-fid and torch-fidelity import, also where its compiled operators do not load.

    Its wheel for CUDA cannot load them beside a PyTorch for CPUs alone. No evaluator calls one, so declaring those that
    the import itself asks for is enough.

    Raises:
        ImportError: torch or torchvision is not installed.
    """
    import torch

    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        _declared.append(library)
        return importlib.import_module("torchvision")
