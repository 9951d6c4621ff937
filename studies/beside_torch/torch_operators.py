"""Imports of PyTorch's libraries where torchvision's compiled operators do not load.

torchvision's wheel for CUDA cannot load its operators beside a PyTorch for CPUs alone. The benchmarks call none, so it
is enough to declare those that the import asks for.
"""

import importlib
import sys
from contextlib import suppress
from typing import Any


def import_torchvision() -> Any:
    """Import torchvision, also where its compiled operators do not load.

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
        module = importlib.import_module("torchvision")
        vars(module)["declared_operators"] = library  # without a reference PyTorch forgets the operators
        return module


def import_diffusers() -> Any:
    """Import diffusers, after torchvision where that is installed.

    Raises:
        ImportError: diffusers is not installed.
    """
    with suppress(ImportError):
        import_torchvision()
    return importlib.import_module("diffusers")
