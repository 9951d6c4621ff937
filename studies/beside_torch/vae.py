"""`python -m studies.beside_torch vae`: Stable Diffusion's VAE in images per second, beside diffusers'."""

import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mpdit_jax.benchmark.common import check_at_least, make_benchmark_parser, print_report, progress, take_turns
from mpdit_jax.errors import InputError, install_extra
from mpdit_jax.validation import check_image_size
from studies.beside_torch.workers import Worker, jax_about, start_workers

_EXAMPLES = """\
  python -m studies.beside_torch vae
  python -m studies.beside_torch vae --vae=/data/sd-vae-ft-ema --image_size=512 --batch_size=4 --dtype=bfloat16
  python -m studies.beside_torch vae --format=json > vae.json
"""
_TASKS = ("encode", "decode")
_SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 256}
_Contestant: TypeAlias = tuple[dict[str, Callable[[], np.ndarray]], dict[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """Measure as the arguments say and print; exit status."""
    parser = make_benchmark_parser(
        "vae",
        "Measure VAE encode and decode in images per second and peak memory of the process, beside PyTorch diffusers' "
        "(extra [parity]) in the same run: the two take turns, and the ratio is of their median times.",
        _EXAMPLES,
        repeats=5,
        command="studies.beside_torch",
    )
    parser.add_argument("--vae", help="folder or hub name (default: random weights of the size of Stable Diffusion's)")
    parser.add_argument("--image_size", type=int, default=256, help="side in pixels (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="images a call (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    check_image_size(options.image_size, "--image_size")
    check_at_least(options, 1, ("batch_size", "repeats"))
    return print_report(options, measure(options), _as_text)


def measure(options: Namespace) -> dict[str, Any]:
    """Run the benchmark; the report as plain numbers and strings.

    Raises:
        MPDiTError: a contestant could not load the VAE or run it.
    """
    from mpdit_jax.vae.hub import locate

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        if options.vae is None:
            progress("making random weights")
            with Worker("weights", make_random_folder, scratch, _SD_VAE) as maker:
                folder = maker.about["folder"]
        else:
            folder = str(locate(options.vae))
        torch = {"torch": set_up_torch} if find_spec("torch") and find_spec("diffusers") else {}
        workers = start_workers(
            stack, {"jax": set_up_jax, **torch}, folder, options.image_size, options.batch_size, options.dtype
        )
        seconds = take_turns(
            options.repeats,
            {f"{worker.name} {task}": partial(worker.time, task) for task in _TASKS for worker in workers},
        )
        report: dict[str, Any] = {
            "vae": options.vae or "random weights, Stable Diffusion's size",
            **{key: vars(options)[key] for key in ("image_size", "batch_size", "dtype", "repeats")},
        }
        for worker in workers:
            rates = {f"{task}_images_per_s": options.batch_size / seconds[f"{worker.name} {task}"] for task in _TASKS}
            report[worker.name] = {**worker.about, **rates, "peak_memory_mb": worker.peak_memory() / 1e6}
        if len(workers) == 2:
            ours, theirs = workers
            report["jax_over_torch"] = {task: seconds[f"torch {task}"] / seconds[f"jax {task}"] for task in _TASKS}
            report["relative_difference"] = {
                task: _relative_difference(ours.result(task), theirs.result(task)) for task in _TASKS
            }
        return report


def make_random_folder(folder: str, fields: Mapping[str, Any]) -> _Contestant:
    """Save an untrained autoencoder with the given config fields; runs in a worker."""
    from flax import nnx

    from mpdit_jax.model.parameters import split
    from mpdit_jax.vae import Autoencoder, AutoencoderConfig, save_folder

    config = AutoencoderConfig(**fields)
    save_folder(folder, config, split(Autoencoder(config, rngs=nnx.Rngs(0)))[1])
    return {}, {"folder": folder}


def set_up_jax(folder: str, image_size: int, batch_size: int, dtype: str) -> _Contestant:
    """Our VAE, compiled; runs in a worker."""
    import jax

    from mpdit_jax.vae import load_vae

    vae = load_vae(folder, dtype=dtype)
    images, latents = (jax.device_put(x) for x in _inputs(vae.config, image_size, batch_size))
    tasks = {
        "encode": lambda: np.concatenate(vae.encode(images), axis=-1),
        "decode": lambda: np.asarray(vae.decode(latents, clip=False)),
    }
    for task in tasks.values():
        task()
    return tasks, jax_about()


def set_up_torch(folder: str, image_size: int, batch_size: int, dtype: str) -> _Contestant:
    """Diffusers' AutoencoderKL, on a GPU if PyTorch has one; runs in a worker."""
    import torch

    from mpdit_jax.vae.config import read_config
    from studies.beside_torch.torch_operators import import_diffusers

    diffusers = import_diffusers()

    precision = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=precision, low_cpu_mem_usage=False)
    vae = loaded.to(device).eval()
    config = read_config(Path(folder) / "config.json")
    images, latents = (
        torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).to(device, precision)
        for x in _inputs(config, image_size, batch_size)
    )

    def encode() -> np.ndarray:
        with torch.inference_mode():
            posterior = vae.encode(images).latent_dist
            return _channels_last(torch.cat([posterior.mean, posterior.std], dim=1))

    def decode() -> np.ndarray:
        with torch.inference_mode():
            return _channels_last(vae.decode(latents).sample)

    tasks = {"encode": encode, "decode": decode}
    for task in tasks.values():
        task()
    return tasks, {"version": torch.__version__, "device": device}


def _channels_last(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.float().cpu().numpy()).transpose(0, 2, 3, 1)


def _inputs(config: Any, image_size: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The same images in [-1, 1] and unscaled latents for every contestant."""
    random, factor = np.random.default_rng(0), config.downsample_factor
    if image_size % factor:
        raise InputError(f"--image_size={image_size}: expected a multiple of the VAE's downsample factor {factor}.")
    side = image_size // factor
    images = random.uniform(-1, 1, (batch_size, image_size, image_size, config.in_channels))
    latents = random.normal(size=(batch_size, side, side, config.latent_channels)) / config.scaling_factor
    return images.astype(np.float32), latents.astype(np.float32)


def _relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _as_text(report: Mapping[str, Any]) -> str:
    size = report["image_size"]
    lines = [f"{report['vae']}: {report['dtype']}, {size}x{size} pixels, batches of {report['batch_size']}"]
    lines.append(f"{'':24}{'encode':>12}{'decode':>12}{'peak memory':>14}")
    for name in ("jax", "torch"):
        if name in report:
            row = report[name]
            label = f"{name} {row['version']}, {row['device']}"
            lines.append(
                f"{label:24}{row['encode_images_per_s']:8.3f} im/s{row['decode_images_per_s']:8.3f} im/s"
                f"{row['peak_memory_mb']:11.0f} MB"
            )
    if "jax_over_torch" in report:
        ratio, difference = report["jax_over_torch"], report["relative_difference"]
        lines.append(f"{'jax over torch':24}{ratio['encode']:11.2f}x{ratio['decode']:11.2f}x")
        lines.append(f"{'relative difference':24}{difference['encode']:12.1e}{difference['decode']:12.1e}")
    else:
        lines.append(f"PyTorch and diffusers are not installed; to compare, {install_extra('parity')}.")
    return "\n".join(lines)
