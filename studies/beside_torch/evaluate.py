"""`python -m studies.beside_torch evaluate`: images per second through FID's Inception, beside pytorch-fid's."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from mpdit_jax.benchmark.common import check_at_least, make_benchmark_parser, print_report, progress, take_turns, timed
from mpdit_jax.errors import install_extra
from mpdit_jax.runtime.cli import Parser
from mpdit_jax.validation import check_image_size
from studies.beside_torch.workers import jax_about, peak_memory, start_workers

_EXAMPLES = """\
  python -m studies.beside_torch evaluate
  python -m studies.beside_torch evaluate --batch_size=32 --repeats=10 --format=json > evaluate.json
  python -m studies.beside_torch evaluate --repeats=0 --neighbours=50000
"""


def make_evaluate_parser() -> Parser:
    """The arguments of the benchmark."""
    parser = make_benchmark_parser(
        "evaluate",
        "Measure Inception's features in images per second, resizing included, beside pytorch-fid's (extra [parity]) "
        "in the same run: the two take turns, with random weights, and the ratio is of their median times.",
        _EXAMPLES,
        repeats=5,
        command="studies.beside_torch",
    )
    parser.add_argument("--image_size", type=int, default=256, help="side in pixels (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="images a call (default: %(default)s)")
    parser.add_argument(
        "--neighbours", type=int, default=0, metavar="N", help="also time precision and recall of N by N images"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Measure as the arguments say and print; exit status."""
    options = make_evaluate_parser().parse_args(arguments)
    check_image_size(options.image_size, "--image_size", least=8)
    check_at_least(options, 1, ("batch_size",))
    check_at_least(options, 0, ("repeats", "neighbours"))
    return print_report(options, measure(options), _as_text)


def measure(options: Namespace) -> dict[str, Any]:
    """Run the benchmark; the report as plain numbers and strings.

    Raises:
        MPDiTError: a contestant could not start.
    """
    report: dict[str, Any] = {key: vars(options)[key] for key in ("image_size", "batch_size", "repeats")}
    if options.repeats:
        setups = {"jax": set_up_jax, **({"pytorch_fid": set_up_pytorch_fid} if find_spec("pytorch_fid") else {})}
        with ExitStack() as stack:
            workers = start_workers(stack, setups, options.image_size, options.batch_size)
            tasks = {worker.name: partial(worker.time, "features") for worker in workers}
            seconds = take_turns(options.repeats, tasks)
            for worker in workers:
                report[worker.name] = {**worker.about, "images_per_s": options.batch_size / seconds[worker.name]}
        if len(workers) == 2:
            report["jax_over_pytorch_fid"] = seconds["pytorch_fid"] / seconds["jax"]
    if options.neighbours:
        progress(f"precision and recall of {options.neighbours} by {options.neighbours} images")
        taken = time_neighbours(options.neighbours)
        report["neighbours"] = {"images": options.neighbours, "seconds": taken, "peak_bytes": peak_memory()}
    return report


def time_neighbours(count: int, dimension: int = 2048) -> float:
    """Seconds of precision and recall between two sets of so many random features, compilation included."""
    from mpdit_jax.evaluate.metrics import precision_recall

    random = np.random.default_rng(0)
    real, fake = (random.standard_normal((count, dimension), np.float32) for _ in range(2))
    return timed(lambda: precision_recall(real, fake))


def set_up_jax(image_size: int, batch_size: int) -> tuple[dict[str, Callable[[], np.ndarray]], dict[str, Any]]:
    """Our extractor with random weights, compiled; runs in a worker."""
    import jax
    from flax import nnx

    from mpdit_jax.evaluate.extractors import build_inception
    from mpdit_jax.evaluate.inception import Inception

    model, key = Inception(), jax.random.key(0)
    state = nnx.state(model, nnx.Param)
    random = jax.tree.map(lambda leaf: 0.02 * jax.random.normal(key, leaf.shape), state)
    nnx.update(model, random)
    extractor = build_inception(model, batch_size=batch_size)
    images = _images(image_size, batch_size)
    extractor(images)
    return {"features": lambda: extractor(images)["pool"]}, jax_about()


def set_up_pytorch_fid(image_size: int, batch_size: int) -> tuple[dict[str, Callable[[], np.ndarray]], dict[str, Any]]:
    """pytorch-fid's network with random weights, on a GPU if PyTorch has one; runs in a worker."""
    from studies.beside_torch.torch_operators import import_torchvision

    import_torchvision()
    import pytorch_fid.inception as port
    import torch

    # It would fetch its weights from the web; any of the right shapes do here.
    plain = port._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    port.load_state_dict_from_url = lambda *args, **kwargs: plain.state_dict()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = port.InceptionV3([3]).to(device).eval()
    images = _images(image_size, batch_size)

    def features() -> np.ndarray:
        with torch.inference_mode():
            x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
            return np.asarray(network(x)[0][:, :, 0, 0].cpu().numpy())

    features()
    return {"features": features}, {"version": torch.__version__, "device": device}


def _images(image_size: int, batch_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch_size, image_size, image_size, 3), dtype=np.uint8)


def _as_text(report: Mapping[str, Any]) -> str:
    lines = []
    if "jax" in report:
        size = report["image_size"]
        lines.append(f"Inception, {size}x{size} pixels in batches of {report['batch_size']}, float32")
        for name in ("jax", "pytorch_fid"):
            if name in report:
                row = report[name]
                lines.append(
                    f"{name + ' ' + row['version'] + ', ' + row['device']:40}{row['images_per_s']:9.2f} images/s"
                )
        if "jax_over_pytorch_fid" in report:
            lines.append(f"{'jax over pytorch_fid':40}{report['jax_over_pytorch_fid']:9.2f}x")
        else:
            lines.append(f"pytorch-fid is not installed; to compare, {install_extra('parity')}.")
    if "neighbours" in report:
        count, seconds = report["neighbours"]["images"], report["neighbours"]["seconds"]
        peak = report["neighbours"]["peak_bytes"] / 2**30
        lines.append(
            f"precision and recall of {count:,} by {count:,} images, 2048 features: {seconds:.1f} s, "
            f"at most {peak:.2f} GiB in memory"
        )
    return "\n".join(lines)
