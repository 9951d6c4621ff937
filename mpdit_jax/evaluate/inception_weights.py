"""Find, read and convert Inception's weights."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from flax import nnx

from mpdit_jax.errors import WeightsError
from mpdit_jax.evaluate.inception import Inception
from mpdit_jax.evaluate.layers import assign, entry, fold
from mpdit_jax.interop.files import read_state_dict
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.paths import expand

VARIABLE = "MPDIT_JAX_INCEPTION"
CACHE = Path("~/.cache/mpdit_jax")
NAMES = (
    "inception-2015-12-05.safetensors",
    "pt_inception-2015-12-05-6726825d.pth",  # of pytorch-fid
    "weights-inception-2015-12-05-6726825d.pth",  # of torch-fidelity
)
_PAGE = "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"
_EPSILON = 1e-3
# Published names of the first convolutions; the names of the mixed blocks are ours, capitalized.
_STEM = {
    "conv_1a": "Conv2d_1a_3x3",
    "conv_2a": "Conv2d_2a_3x3",
    "conv_2b": "Conv2d_2b_3x3",
    "conv_3b": "Conv2d_3b_1x1",
    "conv_4a": "Conv2d_4a_3x3",
}
_IGNORED = re.compile(r"AuxLogits\..*|.*\.num_batches_tracked")


def locate_inception(path: str = "", *, prefix: str = "--") -> Path:
    """Return the weights file: the given path, else MPDIT_JAX_INCEPTION, else a file in ~/.cache/mpdit_jax.

    `prefix` begins flags or fields in messages, "--" or "config.eval.". Raises WeightsError if there is no file; the
    message says what to download and where to put it.
    """
    named = path or os.environ.get(VARIABLE, "")
    if named:
        found = expand(named)
        if found.is_file():
            return found
        origin = f"{prefix}inception={path}" if path else f"{VARIABLE}={named}"
        raise WeightsError(f"{origin}: no such file; {_remedy(prefix)}")
    folder = expand(CACHE)
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"there are no Inception weights in {folder}: {_remedy(prefix)}")


def load_inception(path: str | Path, *, prefix: str = "--") -> Inception:
    """Load a `.pth` of pytorch-fid or torch-fidelity, or a safetensors of the same names.

    Raises:
        WeightsError: a missing or damaged file, or the weights of another network.
        MissingExtraError: a `.pth` without PyTorch installed.
    """
    return from_torch(read_state_dict(path), str(path), prefix=prefix)


def convert_inception(source: str | Path, target: str | Path) -> None:
    """Write a weights file as safetensors, readable without PyTorch; raises WeightsError for other weights."""
    state = read_state_dict(source)
    from_torch(state, str(source))
    kept = {name: np.ascontiguousarray(array) for name, array in state.items() if not _IGNORED.fullmatch(name)}
    with atomic_write(target) as file:
        file.write(safetensors.numpy.save(kept, metadata={"format": "pt"}))


def from_torch(state: Mapping[str, np.ndarray], source: str, *, prefix: str = "--") -> Inception:
    """Build the network from a state dict under the published names, read from the file `source`.

    Raises WeightsError if entries are missing, extra, misshapen or not finite.
    """
    if "fc.weight" in state and np.shape(state["fc.weight"])[0] == 1000:
        raise WeightsError(
            f"{source} is torchvision's Inception v3 of 1,000 classes, which is not the network of FID: "
            f"{_remedy(prefix)}"
        )
    arrays: dict[str, np.ndarray] = {}
    left = {name for name in state if not _IGNORED.fullmatch(name)}
    model = Inception()
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *parts, kind = map(str, path)
        if kind != "kernel" or parts == ["fc"]:
            continue
        name = published_name(parts)
        kernel, bias = fold(state, f"{name}.conv", f"{name}.bn", _EPSILON, source)
        arrays |= {f"{'.'.join(parts)}.kernel": kernel, f"{'.'.join(parts)}.bias": bias}
        left -= {f"{name}.conv.weight", *(f"{name}.bn.{n}" for n in ("weight", "bias", "running_mean", "running_var"))}
    arrays["fc.kernel"] = entry(state, "fc.weight", source, 2).T[None, None]
    arrays["fc.bias"] = entry(state, "fc.bias", source, 1)
    if left := left - {"fc.weight", "fc.bias"}:
        raise WeightsError(
            f"{source}: entry {min(left)} has no place in the Inception network of FID; {_remedy(prefix)}"
        )
    assign(model, arrays, source)
    return model


def published_name(path: Sequence[str]) -> str:
    """Return the published name of a convolution, such as Mixed_5b.branch1x1."""
    return ".".join([_STEM.get(path[0], path[0].capitalize()), *path[1:]])


def _remedy(prefix: str) -> str:
    return (
        f"download {NAMES[1]} (pytorch-fid, {_PAGE}) to {CACHE}/, or give its path by {prefix}inception=FILE or "
        f"{VARIABLE}=FILE; FD(efficientnet_lite0) needs no download ({prefix}features=efficientnet_lite0)."
    )
