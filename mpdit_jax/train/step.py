"""One training step: noising, loss, gradients, update, moving average, and whether the step is applied."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jaxlib
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from mpdit_jax.config.base import model_config
from mpdit_jax.data.latents import LatentSpace
from mpdit_jax.distributed.mesh import batch_sharding
from mpdit_jax.flow.flow_map import FlowMapLoss, draw_jumps
from mpdit_jax.flow.objective import LogitNormal, flow_matching_loss, interpolate, time_distribution
from mpdit_jax.model.masking import draw_kept, masked_velocity, split_error
from mpdit_jax.model.parameters import Parameters, Structure, merge
from mpdit_jax.model.trunk_drop import dropped_velocity
from mpdit_jax.train import guard as guards
from mpdit_jax.train.metric_window import add_step
from mpdit_jax.train.state import TrainState

Batch: TypeAlias = dict[str, jax.Array]
"""`y` int32 (B,), and `x` float32 (B, H, W, C) or, of latents, `mean` and `std` float16 (B, views, H, W, C)."""


class NoisyBatch(NamedTuple):
    """A batch with everything random drawn, so that its loss is a plain function of it."""

    x: jax.Array  # (B, H, W, C)
    y: jax.Array  # (B,), the null class where the label was dropped
    t: jax.Array  # (B,)
    noise: jax.Array  # (B, H, W, C)
    kept: jax.Array | None = None  # (B, K), the tokens that the trunk sees; None for all
    r: jax.Array | None = None  # (B,), end times of a flow map; None for flow matching
    w: jax.Array | None = None  # (B,), guidance scales of a flow map that takes them as an input
    dropped: jax.Array | None = None  # (B,) bool, whether the tail sees no trunk; None for never


Noising: TypeAlias = Callable[[Batch, jax.Array], NoisyBatch]
"""(batch, key) to the noisy batch."""
LossAux: TypeAlias = tuple[jax.Array, dict[str, jax.Array]]
"""The loss of each example (B,), for a flow map its squared error; and more scalars for the log."""
LossFunction: TypeAlias = Callable[[Parameters, NoisyBatch], tuple[jax.Array, LossAux]]
"""(parameters, noisy batch) to the mean loss and its LossAux."""
Step: TypeAlias = Callable[[TrainState, Batch], TrainState]


def make_noising(config: FrozenConfigDict, latents: LatentSpace | None = None) -> Noising:
    """Return the function that draws what is random in a step: label dropout, times, noise, latents, hidden tokens.

    `latents` is the space of the batches' moments; None if they hold images.
    """
    times = time_distribution(config.time.distribution, config.time.mean, config.time.std)
    null, model, ratio = config.model.num_classes, model_config(config), config.mask_ratio
    first, second = config.flow_map.start_times, config.flow_map.end_times
    jump_times = (LogitNormal(*first), LogitNormal(*second))

    def noising(batch: Batch, key: jax.Array) -> NoisyBatch:
        dropout_key, flow_key = jax.random.split(key)
        time_key, noise_key = jax.random.split(flow_key)
        x = batch["x"] if latents is None else sample_latents(jax.random.fold_in(key, 2), batch, latents)
        t, r = times.sample(time_key, x.shape[0]), None
        if config.objective == "flow_map":
            jumps = draw_jumps(jax.random.fold_in(key, 4), x.shape[0], jump_times)
            is_jump = jnp.arange(x.shape[0]) % 2 == 0
            t, r = jnp.where(is_jump, jumps[:, 0], t), jnp.where(is_jump, jumps[:, 1], t)
        scales = jax.random.uniform(jax.random.fold_in(key, 5), t.shape) if model.guidance_max > 1 else None
        share = config.trunk_drop
        return NoisyBatch(
            x=x,
            y=drop_labels(dropout_key, batch["y"], config.label_dropout, null),
            t=t,
            r=r,
            noise=jax.random.normal(noise_key, x.shape),
            kept=draw_kept(jax.random.fold_in(key, 3), model, ratio, x.shape[0]) if ratio else None,
            w=None if scales is None else model.guidance_max**scales,  # from 1 to guidance_max, uniform in log w
            dropped=jax.random.bernoulli(jax.random.fold_in(key, 6), share, t.shape) if share else None,
        )

    return noising


def sample_latents(key: jax.Array, batch: Batch, space: LatentSpace) -> jax.Array:
    """Draw a normalized sample of each posterior, float32 (B, H, W, C), from a random one of its views."""
    view_key, noise_key = jax.random.split(key)
    count, views = batch["mean"].shape[:2]
    chosen = jax.random.randint(view_key, (count, 1, 1, 1, 1), 0, views)

    def of_view(moments: jax.Array) -> jax.Array:
        return jnp.take_along_axis(moments, chosen, axis=1)[:, 0].astype(jnp.float32)  # (B, H, W, C)

    mean, std = of_view(batch["mean"]), of_view(batch["std"])
    sample = mean + std * jax.random.normal(noise_key, mean.shape)
    shift, scale = (jnp.asarray(each, jnp.float32)[None, None, None] for each in (space.mean, space.std))
    return (sample - shift) / scale


def drop_labels(key: jax.Array, labels: jax.Array, rate: float, null: int) -> jax.Array:
    """Replace each label by the null class with probability `rate`; labels (B,)."""
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), null, labels)


def make_loss(
    structure: Structure, mask_loss_weight: float = 0.0, flow_map_loss: FlowMapLoss | None = None
) -> LossFunction:
    """Return the flow-matching loss of a model's parameters, or the loss of a flow map.

    With hidden tokens it is the mean over the kept tokens plus `mask_loss_weight` times the mean over the hidden ones.
    The noise of hidden tokens cannot be predicted, so that the best prediction of their velocity is minus the image
    (MaskDiT).
    """

    def loss(parameters: Parameters, noisy: NoisyBatch) -> tuple[jax.Array, LossAux]:
        model = merge(structure, parameters)
        if flow_map_loss is not None and noisy.r is not None:
            value, errors, metrics = flow_map_loss(model, noisy.x, noisy.y, noisy.t, noisy.r, noisy.noise, noisy.w)
            return value, (errors, metrics)
        if noisy.kept is None:
            dropped = noisy.dropped
            velocity = model if dropped is None else lambda x, t, y: dropped_velocity(model, x, t, y, dropped)
            value, per_example = flow_matching_loss(velocity, noisy.x, noisy.y, t=noisy.t, noise=noisy.noise)
            return value, (per_example, {})
        z, target = interpolate(noisy.x, noisy.noise, noisy.t)
        error = masked_velocity(model, z, noisy.t, noisy.y, noisy.kept) - target
        kept, hidden = split_error(jnp.square(error), noisy.kept, model.config.patch_sizes[0])  # (B,) each
        per_example = kept + mask_loss_weight * hidden
        return per_example.mean(), (per_example, {})

    return loss


def config_loss(config: FrozenConfigDict, structure: Structure) -> LossFunction:
    """Return the loss of a config's objective."""
    if config.objective == "flow_matching":
        return make_loss(structure, config.mask_loss_weight)
    settings = config.flow_map
    return make_loss(structure, flow_map_loss=FlowMapLoss(settings.p, settings.guidance, settings.guidance_until))


def build_train_step(
    config: FrozenConfigDict,
    structure: Structure,
    optimizer: optax.GradientTransformation,
    latents: LatentSpace | None = None,
) -> Step:
    """Build the train step shared by train, replay, compile and benchmark; `latents` as for `make_noising`."""
    return make_step(
        make_noising(config, latents),
        config_loss(config, structure),
        optimizer,
        config.ema_decay,
        ema_warmup=config.ema.warmup,
        accumulation=config.gradient_accumulation,
        spike_factor=config.guard.spike_factor,
    )


def make_step(
    noising: Noising,
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    *,
    ema_warmup: bool = False,
    accumulation: int = 1,
    spike_factor: float = 0.0,
) -> Step:
    """Return the update as a pure function of (state, batch), not jitted.

    Args:
        noising, loss, optimizer, ema_decay: the parts of the step.
        ema_warmup: whether the decay is min(ema_decay, (1 + step) / (10 + step)), with the number of steps done before.
        accumulation: parts the batch is cut into; their gradients are averaged, at the memory of one part.
        spike_factor: skip a step whose gradient norm is this many times the running mean; 0 for never (`train.guard`).
    """

    def step(state: TrainState, batch: Batch) -> TrainState:
        noisy = noising(batch, jax.random.fold_in(jax.random.key(state.seed), state.step))
        value, (per_example, more), gradients = accumulated(loss, state.parameters, noisy, accumulation)
        gradient_norm = optax.tree.norm(gradients)
        # Decided before the update is applied, so that old and new state never lie in memory side by side.
        applied = guards.should_apply(state.guard, value, gradient_norm, spike_factor)
        with jax.numpy_dtype_promotion("standard"):  # Optax takes powers of integers
            updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        decay = warmed_up(ema_decay, state.step) if ema_warmup else ema_decay
        ema_parameters = moving_average(state.ema_parameters, parameters, decay)
        metrics = {
            "loss": value,
            "gradient_norm": gradient_norm,
            "update_norm": optax.tree.norm(updates),
            "parameter_norm": optax.tree.norm(parameters),
            **more,
        }
        kept = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old),
            (parameters, ema_parameters, optimizer_state),
            (state.parameters, state.ema_parameters, state.optimizer_state),
        )
        finite = jnp.isfinite(metrics["update_norm"]) & jnp.isfinite(metrics["parameter_norm"])
        guard = guards.update(state.guard, applied, finite, gradient_norm)
        skipped, number = guard["skipped_in_a_row"], state.step + 1
        return TrainState(
            step=number,
            seed=state.seed,
            parameters=kept[0],
            ema_parameters=kept[1],
            optimizer_state=kept[2],
            guard=guard,
            window=add_step(state.window, number, applied, finite, metrics, noisy.t, per_example, skipped),
        )

    return step


def accumulated(
    loss: LossFunction, parameters: Parameters, noisy: NoisyBatch, parts: int
) -> tuple[jax.Array, LossAux, Parameters]:
    """Return the mean loss, its LossAux and the mean gradient, from `parts` equal parts of the batch one at a time."""
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, aux), gradients = gradient(parameters, noisy)
        return value, aux, gradients

    unit = 1 if noisy.r is None else 2  # a flow map's examples come in pairs, which stay together

    def interleaved(x: jax.Array) -> jax.Array:
        # Every part takes rows from everywhere, so that each device has its share of each.
        x = x.reshape(x.shape[0] // parts // unit, parts, unit, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(parts, -1, *x.shape[3:])  # (parts, B / parts, ...)

    def restored(x: jax.Array) -> jax.Array:
        return x.reshape(parts, -1, unit, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])  # (B, ...)

    def add(total: tuple[jax.Array, Parameters], part: NoisyBatch) -> tuple[tuple[jax.Array, Parameters], LossAux]:
        (value, aux), gradients = gradient(parameters, part)
        return jax.tree.map(jnp.add, total, (value, gradients)), aux

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters))
    (value, gradients), (per_example, more) = jax.lax.scan(add, zero, jax.tree.map(interleaved, noisy))
    mean = jax.tree.map(lambda total: total / parts, gradients)
    return value / parts, (restored(per_example), {name: scalar.mean() for name, scalar in more.items()}), mean


def warmed_up(decay: float, step: jax.Array) -> jax.Array:
    """min(decay, (1 + step) / (10 + step)): the average soon forgets the initial parameters; float32 scalar."""
    number = step.astype(jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1 + number) / (10 + number))


def moving_average(average: Parameters, parameters: Parameters, decay: float | jax.Array) -> Parameters:
    """decay * average + (1 - decay) * parameters."""
    return jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, average, parameters)


# XLA's CPU backend copies parameters and moments before it overwrites them, unless this analysis shows that it need
# not. (Leave it out for a jaxlib that says "No such compile option".)
_CPU_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}
# With the first flag collectives overlap with matrix products; else XLA waits for each up to Ampere. jaxlib 0.10 cannot
# compile this step's products with Triton for Hopper ("Couldn't find output tile sizes"), so cuBLAS computes them.
_GPU_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True} | (
    {"xla_gpu_enable_triton_gemm": False} if jaxlib.__version__.startswith("0.10.") else {}
)
_OPTIONS = {"cpu": _CPU_OPTIONS, "gpu": _GPU_OPTIONS}


def jit_step(step: Step, state: TrainState, mesh: Mesh) -> Step:
    """Jit a step for a mesh: the state laid out like `state` (arrays or shapes) and donated, the batch split.

    Call it under `jax.set_mesh(mesh)`, which the model's activation constraints read.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=shardings,
        donate_argnums=0,
        compiler_options=_OPTIONS.get(mesh.devices.flat[0].platform),
    )
