"""`python -m studies.flow_map`: quality against evaluations, of flow models and of flow maps trained from them.

Every part trains its models for several seeds on digits or Fashion-MNIST and draws with few and many evaluations. All
models see the training split; the independent classifier is fitted to the other. docs/flow_map.md has the commands.
"""

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mpdit_jax.compile.programs import compile_step
from mpdit_jax.config.base import resolve
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import InputError
from mpdit_jax.flow.randomness import seed_key
from mpdit_jax.flow.sampler import make_sampler
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.pictures import grid, save_png, to_uint8
from mpdit_jax.model.accounting import count_macs, tail_macs
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.trunk_drop import TailOnly
from mpdit_jax.runtime.cli import make_parser, run
from mpdit_jax.train.state import TrainState
from studies.flow_map_models import DATA, Recipe, Zoo, make_trainer
from studies.judge import Judge, make_judge
from studies.records import Record, Records, pyplot
from studies.trainer import Trainer

EVALUATIONS = (1, 2, 4, 8, 16, 50)
FEW = (1, 2, 4)
SCALES = (1.5, 2.5, 4.0)
MAP = ("objective", "flow_map")
_BATCH = 250  # images drawn at a time
_EXAMPLES = """\
  python -m studies.flow_map --part=evaluations
  python -m studies.flow_map --part=evaluations --data=fashion_mnist --path=FOLDER --flow_steps=10000 --map_steps=4000
  python -m studies.flow_map --part=all --seeds=3
"""


@dataclasses.dataclass(frozen=True)
class Draw:
    """Settings of one set of samples."""

    solver: str
    evaluations: int
    scale: float = 1.0
    guide: str = "null"  # what two-pass guidance guides away from: the null class, or the tail alone
    one_pass: bool = False  # whether the scale is trained in or an input


Study = dict[str, tuple[Recipe, list[Draw]]]
"""The models of a part by name, with what is drawn from each."""


def euler(evaluations: Sequence[int] = EVALUATIONS, **more: Any) -> list[Draw]:
    """Settings of Euler."""
    return [Draw("euler", count, **more) for count in evaluations]


def jumps(evaluations: Sequence[int] = EVALUATIONS, **more: Any) -> list[Draw]:
    """Settings of jumps."""
    return [Draw("flow_map", count, **more) for count in evaluations]


def evaluations(flow: Recipe, map_steps: int) -> Study:
    """The flow model, its split without training, the map, and the flow model trained as many steps longer."""
    longer = dataclasses.replace(flow, steps=flow.steps + map_steps)
    trained = Recipe(flow.data, map_steps, flow, (MAP,))
    return {
        "flow": (flow, euler() + jumps()),
        "longer": (longer, euler() + jumps()),
        "map": (trained, jumps() + euler()),
    }


def where_r(flow: Recipe, map_steps: int) -> Study:
    """Where the time of arrival enters, and a map trained from the start."""
    kinds = {kind: Recipe(flow.data, map_steps, flow, (MAP,), kind) for kind in ("boundary", "final_layer", "mean")}
    kinds["from_scratch"] = Recipe(flow.data, flow.steps + map_steps, None, (MAP,))
    return {name: (recipe, jumps(FEW)) for name, recipe in kinds.items()}


def power(flow: Recipe, map_steps: int) -> Study:
    """The power of the adaptive weight."""
    return _maps(flow, map_steps, {f"p={p:g}": (("flow_map.p", p),) for p in (0.0, 0.5, 1.0)})


def guidance(flow: Recipe, map_steps: int) -> Study:
    """Guidance by two passes, trained in, and as an input."""
    plain, trained_in, scale_input = (
        Recipe(flow.data, map_steps, flow, (MAP, *changes))
        for changes in ((), (("flow_map.guidance", 0.6),), (("model.guidance_max", max(SCALES)),))
    )
    as_input = [draw for scale in (1.0, *SCALES) for draw in jumps(FEW, scale=scale, one_pass=True)]
    two_passes = [draw for scale in SCALES for draw in jumps(FEW, scale=scale)]
    return {
        "flow": (flow, [draw for scale in (1.0, *SCALES) for draw in euler((50,), scale=scale)]),
        "two passes": (plain, jumps(FEW) + two_passes),
        "g=0.6": (trained_in, jumps(FEW)),
        "input": (scale_input, as_input),
    }


def time_embedding(flow: Recipe, map_steps: int) -> Study:
    """FNO with both initializations, and sinusoids; each with a flow model of its own."""
    kinds: dict[str, tuple[tuple[str, Any], ...]] = {
        "fno paper": (), "fno scaled": (("model.fno_init", "scaled"),),
        "sinusoidal": (("model.time_embedding", "sinusoidal"),),
    }  # fmt: skip
    found: Study = {}
    for name, changes in kinds.items():
        own = dataclasses.replace(flow, changes=changes)
        found[f"{name}, flow"] = own, euler((4, 50))
        found[name] = Recipe(flow.data, map_steps, own, (MAP, *changes)), jumps(FEW)
    return found


def learning_rate(flow: Recipe, map_steps: int) -> Study:
    """The learning rate of the map's training."""
    return _maps(flow, map_steps, {f"{rate:g}": (("optimizer.learning_rate", rate),) for rate in (3e-4, 1e-3, 3e-3)})


def trunk_drop(flow: Recipe, map_steps: int) -> Study:
    """The tail alone as the weak model of autoguidance, beside classifier-free guidance."""
    dropped = dataclasses.replace(flow, changes=(("trunk_drop", 0.1),))
    null = [draw for scale in (1.0, *SCALES) for draw in euler((50,), scale=scale)]
    tail = [draw for scale in SCALES for draw in euler((50,), scale=scale, guide="tail")]
    return {"flow": (flow, null), "trunk_drop=0.1": (dropped, null + tail)}


def _maps(flow: Recipe, map_steps: int, changes: dict[str, tuple[tuple[str, Any], ...]]) -> Study:
    return {name: (Recipe(flow.data, map_steps, flow, (MAP, *more)), jumps(FEW)) for name, more in changes.items()}


PARTS: dict[str, Callable[[Recipe, int], Study]] = {
    "evaluations": evaluations, "where_r": where_r, "power": power, "guidance": guidance,
    "time_embedding": time_embedding, "learning_rate": learning_rate, "trunk_drop": trunk_drop,
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Train, draw and print; return the exit status."""
    parser = make_parser(
        "flow_map",
        "Quality and cost of flow maps beside the flow models that they are trained from. Trained models are kept in "
        "--models and results in --out: the same command continues after an interruption. `--part=cost` compares the "
        "time and the memory of both train steps.",
        _EXAMPLES,
        package="studies",
    )
    parser.add_argument("--part", choices=(*PARTS, "cost", "pictures", "all"), default="evaluations")
    parser.add_argument("--data", choices=tuple(DATA), default="digits", help="(default: %(default)s)")
    parser.add_argument("--path", default="", help="folder of Fashion-MNIST's files (default: Debian's)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model (default: %(default)s)")
    parser.add_argument("--flow_steps", type=int, default=800, help="of the flow model (default: %(default)s)")
    parser.add_argument("--map_steps", type=int, default=800, help="of the map after it (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=500, help="images to judge (default: %(default)s)")
    parser.add_argument("--models", default="runs/flow_map_study", help="trained models (default: %(default)s)")
    parser.add_argument("--out", default="docs/results/flow_map.jsonl", help="(default: %(default)s)")
    parser.add_argument("--images", default="docs/images", help="folder of plots (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("seeds", "flow_steps", "map_steps", "samples"):
        if vars(options)[name] < 1:
            raise InputError(f"--{name}={vars(options)[name]}: expected 1 or more.")
    pyplot()  # fail before the runs if matplotlib is missing
    records, zoo = Records(Path(options.out)), Zoo(Path(options.models), options.path)
    flow, images = Recipe(options.data, options.flow_steps), Path(options.images)
    judge = lru_cache(lambda: make_judge(options.data, options.path))  # only unfinished runs need it
    for part in (*PARTS, "cost", "pictures") if options.part == "all" else (options.part,):
        if part == "cost":
            print(cost_table(records.run("timing", [{"part": "cost", "data": options.data}], _measure_cost(flow, zoo))))
        elif part == "pictures":
            file = images / f"flow_map_{options.data}_pictures.png"
            draw_pictures(zoo, flow, options.map_steps, file)
            print(f"pictures in {file}")
        else:
            study = PARTS[part](flow, options.map_steps)
            runs = list(settings(part, study, options.seeds, options.samples))
            found = records.run(part, runs, partial(measure, study=study, zoo=zoo, make=judge))
            print(as_table(found))
            if part == "evaluations":
                plot(found, images / f"flow_map_{options.data}.png")
    print(f"results in {options.out}")
    return 0


def settings(part: str, study: Study, seeds: int, samples: int) -> Iterator[Record]:
    """Yield the settings of every run of a part."""
    for seed in range(seeds):
        for name, (recipe, _) in study.items():
            yield {"part": part, "data": recipe.data, "model": name, "recipe": recipe.digest(), "seed": seed,
                   "samples": samples}  # fmt: skip


def measure(one: Record, study: Study, zoo: Zoo, make: Callable[[], Judge]) -> Record:
    """Train a model unless it is there, and let the judge that `make` returns compare each of its sets of samples."""
    (recipe, draws), judge = study[one["model"]], make()
    model = zoo.model(recipe, one["seed"])
    labels = np.arange(one["samples"]) % model.num_classes
    points = []
    for draw in draws:
        macs = sampling_macs(model, draw) / 1e9
        values = judge(draw_images(model, draw, labels, one["seed"]), labels)
        points.append({**dataclasses.asdict(draw), "gmacs_an_image": round(macs, 4), **values})
    gmacs = round(recipe.training_gmacs(zoo.path), 1)
    return {"steps": recipe.steps, "training_gmacs": gmacs, "points": points}


def draw_images(model: MPDiT, draw: Draw, labels: np.ndarray, seed: int) -> np.ndarray:
    """Draw an image (H, W, C) for each label."""
    sampler = make_sampler(draw.solver, draw.evaluations, draw.scale)
    guide = TailOnly(model) if draw.guide == "tail" else None
    parts = [np.arange(start, min(start + _BATCH, len(labels))) for start in range(0, len(labels), _BATCH)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some settings are known to draw poorly: they are measured here
        drawn = [sampler(model, labels[rows], seed_key(seed), indices=rows, guide=guide) for rows in parts]
    return np.concatenate([np.asarray(images) for images in drawn])


def sampling_macs(model: MPDiT, draw: Draw) -> int:
    """Count the multiply-adds of drawing one image."""
    second = 0 if draw.scale == 1 or draw.one_pass else tail_macs(model.config)
    if second and draw.guide == "null":
        second = count_macs(model.config)
    return draw.evaluations * (count_macs(model.config) + second)


def _measure_cost(flow: Recipe, zoo: Zoo, turns: int = 41) -> Callable[[Record], Record]:
    """Return a function that times a flow step and a map step in turns, and compiles both for their memory.

    Beside the wall clock there is processor time, which other work on the machine changes less.
    """

    def measure_cost(one: Record) -> Record:
        steps, peaks = dict[str, Callable[[], tuple[float, float]]](), dict[str, int]()
        times = dict[str, list[tuple[float, float]]]()
        for name, recipe in (("flow", flow), ("map", dataclasses.replace(flow, changes=(*flow.changes, MAP)))):
            trainer = make_trainer(recipe, zoo.path)
            steps[name], times[name] = partial(_time_step, trainer, [trainer.first_state(0)]), []
            config = ConfigDict(trainer.config.to_dict())
            config.model.platform = jax.default_backend()  # the program that runs here, and not a GPU's
            peaks[name] = compile_step(resolve(config), make_mesh(devices=jax.devices()[:1])).peak
            steps[name]()  # compiles
        for _ in range(turns):
            for name, step in steps.items():
                times[name].append(step())
        found: Record = {f"{name}_peak_bytes": peak for name, peak in peaks.items()}
        ratios = {"memory_ratio": peaks["map"] / peaks["flow"]}
        for kind, column in (("seconds", 0), ("processor_seconds", 1)):
            medians = {name: statistics.median(row[column] for row in rows) for name, rows in times.items()}
            found |= {f"{name}_{kind}": round(median, 5) for name, median in medians.items()}
            ratios[f"{kind}_ratio"] = medians["map"] / medians["flow"]
        return found | {name: round(ratio, 3) for name, ratio in ratios.items()}

    return measure_cost


def _time_step(trainer: Trainer, states: list[TrainState]) -> tuple[float, float]:
    """Return seconds and processor seconds of one step from the state in the list, and put the next state there."""
    batch = trainer.source.batch(np.arange(trainer.config.batch_size))
    start, processor = time.perf_counter(), time.process_time()
    states[0] = trainer.update(states[0], batch)
    jax.block_until_ready(states[0])
    return time.perf_counter() - start, time.process_time() - processor


def cost_table(records: list[Record]) -> str:
    """Format the cost of a step as Markdown."""
    columns = "flow step, s | map step, s | time | processor time | flow, MiB | map, MiB | memory"
    lines = [f"| data | {columns} |", "|---" * 8 + "|"]
    lines += [
        f"| {r['data']} | {r['flow_seconds']:.4f} | {r['map_seconds']:.4f} | {r['seconds_ratio']:.2f} × | "
        f"{r['processor_seconds_ratio']:.2f} × | {r['flow_peak_bytes'] / 2**20:.1f} | "
        f"{r['map_peak_bytes'] / 2**20:.1f} | {r['memory_ratio']:.2f} × |"
        for r in records
    ]
    return "\n".join(lines)


def draw_pictures(zoo: Zoo, flow: Recipe, map_steps: int, file: Path) -> None:
    """Draw the same noise with 50 Euler steps of the flow model and with 4, 2 and 1 jumps of the map, side by side."""
    models = [zoo.model(recipe, 0) for recipe in (flow, Recipe(flow.data, map_steps, flow, (MAP,)))]
    labels = np.repeat(np.arange(models[0].num_classes), 4)
    drawn = [
        draw_images(models[draw.solver == "flow_map"], draw, labels, 0) for draw in euler((50,)) + jumps((4, 2, 1))
    ]
    rows = np.stack([images.reshape(-1, 4, *images.shape[1:]) for images in drawn], axis=1)  # (classes, 4 sets, 4, ...)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_png(file, grid(to_uint8(rows.reshape(-1, *rows.shape[3:])), 16))


def as_table(records: list[Record]) -> str:
    """Format a part's results as Markdown: mean ± standard deviation over the seeds (n - 1)."""
    costs, metrics = "GMACs of training | GMACs an image", "FD | precision | recall | accuracy"
    lines = [f"| model | solver | evaluations | guidance | {costs} | {metrics} |", "|---" * 10 + "|"]
    for name in dict.fromkeys(record["model"] for record in records):
        rows = [record for record in records if record["model"] == name]
        for index, first in enumerate(rows[0]["points"]):
            cells = [name, first["solver"], str(first["evaluations"]), _guidance(first)]
            cells += [f"{rows[0]['training_gmacs']:,.0f}", f"{first['gmacs_an_image']:.3f}"]
            for metric, digits in (("fd", 2), ("precision", 2), ("recall", 2), ("accuracy", 3)):
                mean, std = _over_seeds(rows, index, metric)
                cells.append(f"{mean:.{digits}f} ± {std:.{digits}f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(records: list[Record], path: Path) -> None:
    """Plot distance, recall and accuracy over the number of evaluations, a line a model and solver."""
    plots = pyplot()
    figure, panels = plots.subplots(1, 3, figsize=(13, 4.2))
    for name in dict.fromkeys(record["model"] for record in records):
        rows = [record for record in records if record["model"] == name]
        for solver in ("euler", "flow_map"):
            indices = [i for i, point in enumerate(rows[0]["points"]) if point["solver"] == solver]
            counts = [rows[0]["points"][i]["evaluations"] for i in indices]
            for axes, metric in zip(panels, ("fd", "recall", "accuracy"), strict=True):
                mean, std = np.array([_over_seeds(rows, i, metric) for i in indices]).T
                style = "-" if solver == "flow_map" else "--"
                axes.errorbar(
                    counts, mean, yerr=std, fmt=f"{style}o", markersize=3.5, capsize=2, label=f"{name}, {solver}"
                )
    for axes, title in zip(panels, ("Fréchet distance", "recall", "independent classifier"), strict=True):
        axes.set(xscale="log", xlabel="evaluations", title=f"{title} (bars: std of seeds)")
        axes.set_xticks(EVALUATIONS, map(str, EVALUATIONS))
        axes.minorticks_off()
    panels[0].set_yscale("log")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plots.close(figure)


def _over_seeds(rows: list[Record], index: int, metric: str) -> tuple[float, float]:
    """Return mean and standard deviation of a point's metric over the seeds."""
    values = np.array([row["points"][index][metric] for row in rows])
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _guidance(point: Record) -> str:
    if point["scale"] == 1:
        return "none"
    return f"{point['scale']:g}, one pass" if point["one_pass"] else f"{point['scale']:g}, {point['guide']}"


if __name__ == "__main__":
    run(main)
