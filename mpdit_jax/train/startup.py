"""What a run checks, loads and prints before its first step."""

from functools import partial
from pathlib import Path

import jax
import optax
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.checkpoint.load import CONFIG
from mpdit_jax.checkpoint.reader import numbered_folders
from mpdit_jax.config.base import model_config, resolve
from mpdit_jax.config.effects import without_effect
from mpdit_jax.data.info import identity, record_dataset
from mpdit_jax.data.latents import normalization_of
from mpdit_jax.data.sources import Source, check_fits, load_source
from mpdit_jax.distributed.collectives import (
    any_process,
    assert_equal_across_processes,
    count_machines,
    run_on_process_0,
)
from mpdit_jax.distributed.mesh import check_batch
from mpdit_jax.errors import ConfigError
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.io.paths import check_local
from mpdit_jax.model.accounting import count, training_flops
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.parameters import abstract
from mpdit_jax.runtime.hardware import peak_flops
from mpdit_jax.sample.drawing import Decode
from mpdit_jax.train.grid import guidance, why_no_grid
from mpdit_jax.train.init_from import initialize_from
from mpdit_jax.train.jax_flags import number_flags
from mpdit_jax.train.state import TrainState, create_state
from mpdit_jax.train.stopwatch import Stopwatch
from mpdit_jax.train.writers import METRICS_FILE


def continued(config: FrozenConfigDict, workdir: Path) -> FrozenConfigDict:
    """Return the config to train with: a run that was started before `ema.warmup` goes on without it. Collective.

    Raises:
        InputError: the workdir is a URL.
    """
    check_local(str(workdir))
    if not any_process(jax.process_index() == 0 and config.ema.warmup and _is_older_than_warmup(workdir)):
        return config
    if jax.process_index() == 0:
        print(f"{workdir} was started without config.ema.warmup, and goes on without it")
    older = ConfigDict(config)
    older.ema.warmup = False
    return FrozenConfigDict(older)


def _is_older_than_warmup(workdir: Path) -> bool:
    try:
        return bool(numbered_folders(workdir)) and "ema" not in parse_json((workdir / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False  # the check of the stored config says what is wrong


def load_data(config: FrozenConfigDict, mesh: Mesh) -> Source:
    """Load the data of a run and check that they fit its model, its mesh and the other processes' data.

    Raises:
        ConfigError: the batch, the model or its attention does not fit the devices or the data.
        DataError: see `load_source`.
        ProcessError: another process reads other data at its own `config.data.path`.
    """
    check_batch(config.batch_size, mesh, config.gradient_accumulation)
    model, platform = model_config(config), mesh.devices.flat[0].platform
    if model.attention == "cudnn" and platform != "gpu":
        raise ConfigError(f"config.model.attention='cudnn' needs an NVIDIA GPU and this is {platform}: give 'xla'.")
    source = load_source(**config.data)
    check_fits(source, (*model.input_size, model.in_channels), model.num_classes)
    assert_equal_across_processes(identity(source) | {name: str(value) for name, value in number_flags().items()})
    return source


def record_data(workdir: Path, source: Source, step: int) -> None:
    """Write what samplers need to know of the data, or check that a run at `step` continues with the same data."""
    run_on_process_0(partial(record_dataset, workdir, source, trained=step > 0))


def first_state(
    config: FrozenConfigDict, model: ModelConfig, optimizer: optax.GradientTransformation, target: TrainState
) -> TrainState:
    """Return the state before the first step of a config's run, laid out like `target`."""
    state = create_state(model, optimizer, target, config.seed)
    return initialize_from(state, config.init_from, model) if config.init_from else state


def make_stopwatch(config: FrozenConfigDict, mesh: Mesh) -> Stopwatch:
    """Return a stopwatch that knows the operations of a step and the devices' peak; every process must call this."""
    model = model_config(config)
    machines = count_machines() if mesh.devices.flat[0].platform == "cpu" else 1  # other peaks are published
    peak = run_on_process_0(partial(peak_flops, mesh, model.dtype, machines))
    return Stopwatch(config.batch_size, training_flops(model, config.mask_ratio), peak)


def log_startup(
    config: FrozenConfigDict, workdir: Path, step: int, source: Source, mesh: Mesh, decode: Decode | None, done: bool
) -> None:
    """Print on process 0 what a run begins or continues with and which settings have no effect, or that it is done."""
    if jax.process_index() > 0:
        return
    if done:
        print(f"{workdir} is done: {step} of {config.steps} steps. For more: --config.steps={2 * step}")
        return
    if step == 0 and (workdir / METRICS_FILE).exists():
        print(f"an earlier start of this run left no checkpoint in {workdir}; it begins again")
    if config.sample.every and guidance(config) != config.sample.guidance_scale:
        print(
            f"grids are drawn without guidance (config.sample.guidance_scale={config.sample.guidance_scale:g}), since "
            f"config.label_dropout={config.label_dropout:g} trains no null class"
        )
    parameters, macs = count(model_config(config))
    several = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(
        f"{'continuing' if step else 'starting'} at step {step} in {workdir}: {len(source):,} images, "
        f"{parameters / 1e6:.2f} M parameters, {macs / 1e9:.3f} GMACs a forward pass, "
        f"{mesh.size} {mesh.devices.flat[0].platform} device(s){several}",
        flush=True,
    )
    notes = _describe_latents(source), describe_average(config), why_no_grid(config, decode), without_effect(config)
    for note in notes:
        if note:
            print(note, flush=True)


def _describe_latents(source: Source) -> str:
    """Return a sentence on the constants that normalize latents; "" for images."""
    if source.latents is None or source.measured is None:
        return ""
    name = normalization_of(source.latents, source.measured)
    constants = {"paper": "the paper's constants", "manifest": "the constants measured on them"}
    return f"latents are normalized by {constants.get(name, 'the factors of their VAE')} (normalization {name!r})"


def describe_average(config: FrozenConfigDict) -> str:
    """Return a sentence where the moving average will hold more than 5 % of the initial weights at the end, else ""."""
    share = config.ema_decay**config.steps
    if config.ema.warmup or share <= 0.05:
        return ""
    return (
        f"at step {config.steps} the moving average, from which samples are drawn, will still hold {share:.0%} of the "
        f"initial weights (config.ema_decay={config.ema_decay:g}, config.ema.warmup=False): draw with --no_ema, or "
        "start with a smaller decay or with --config.ema.warmup=True"
    )


def parameter_table(config: ConfigDict | FrozenConfigDict) -> str:
    """CLU's table of every parameter: name, shape, dtype and size."""
    _, parameters = abstract(model_config(resolve(config)))
    return str(parameter_overview.get_parameter_overview(parameters, include_stats=False))
