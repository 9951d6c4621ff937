"""PyTorch's libraries beside a torchvision whose compiled operators do not fit.

torchvision's wheel for CUDA cannot load its operators beside a PyTorch for CPUs alone. Nothing compared here calls
one, so declaring those that the import itself asks for is enough.
"""

import importlib
import sys
from contextlib import suppress
from typing import Any


def import_torchvision() -> Any:
    """torchvision, which pytorch-fid and torch-fidelity import, also where its compiled operators do not load.

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
        vars(module)["declared_operators"] = library  # PyTorch forgets the operators of a library that nobody holds
        return module


def import_diffusers() -> Any:
    """diffusers, which imports torchvision where that is installed.

    Raises:
        ImportError: diffusers is not installed.
    """
    with suppress(ImportError):
        import_torchvision()
    return importlib.import_module("diffusers")
