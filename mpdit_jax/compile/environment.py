"""The environment that XLA's compilers for TPUs and GPUs need on a machine without them."""

import importlib.util
import logging
import os
from pathlib import Path
from typing import NamedTuple

import jax

from mpdit_jax.errors import MissingExtraError, install_extra

_TPU_DEFAULTS = {
    # Do not search for chips,
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # do not warn that there are none (--topology names the chips),
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    # and let several processes load libtpu at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class CudaCompiler(NamedTuple):
    """The parts of XLA's compiler for NVIDIA GPUs."""

    version: tuple[int, int]  # of CUDA
    toolkit: Path  # folder with bin/ptxas and nvvm/libdevice


# By CUDA's major version: JAX's plugin, the module with NVIDIA's compilers, and CUDA's version in both.
_PLUGINS = {
    13: ("jax_plugins.xla_cuda13", "nvidia.cu13", (13, 0)),
    12: ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc", (12, 9)),
}


def prepare(devices: int = 0, *, gpus: bool = False) -> None:
    """Keep JAX on the CPU and let libtpu and XLA compile without chips or cards; call it before JAX is used.

    Args:
        devices: number of virtual CPU devices; 0 for one.
        gpus: also prepare for NVIDIA GPUs.

    Raises:
        MissingExtraError: `gpus`, and a part of their compiler is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")  # JAX read the variable when it was imported
    for name, value in _TPU_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if devices:
        _add_flag(f"--xla_force_host_platform_device_count={devices}")
    if gpus:
        # Neither the plugin nor XLA finds a driver, and they need not.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        logging.getLogger("jax_plugins").setLevel(logging.ERROR)
        toolkit = find_cuda_compiler().toolkit
        _add_flag(f"--xla_gpu_cuda_data_dir={toolkit}")
        os.environ["PATH"] = f"{toolkit / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"  # where XLA looks for ptxas


def find_cuda_compiler() -> CudaCompiler:
    """Return the installed compiler for NVIDIA GPUs; raises MissingExtraError that names the part which is missing."""
    missing = "JAX's plugin for CUDA (jax-cuda12-pjrt or jax-cuda13-pjrt, about 0.2 GB)"
    for major, (plugin, module, version) in _PLUGINS.items():
        if _folder(plugin) is None:
            continue
        toolkit = _folder(module)
        if toolkit is not None and (toolkit / "bin/ptxas").is_file() and (toolkit / "nvvm/libdevice").is_dir():
            return CudaCompiler(version, toolkit)
        wheels = {12: "nvidia-cuda-nvcc-cu12", 13: "nvidia-cuda-nvcc and nvidia-nvvm"}[major]
        missing = f"NVIDIA's assembler for CUDA {major} ({wheels}, about 0.1 GB)"
    raise MissingExtraError(f"compiling for GPUs needs {missing}: {install_extra('gpu-compile')} (no GPU is needed).")


def _folder(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even its parent
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def _add_flag(flag: str) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
