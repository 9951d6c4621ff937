"""The base config of every experiment, and how it becomes one that can run."""

import dataclasses
import json
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import placeholder

from mpdit_jax.config.checks import check_fields, check_values, expect, leaves
from mpdit_jax.errors import ConfigError
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.model.config import ModelConfig, drop_unused
from mpdit_jax.model.presets import PRESETS, preset_config

# What a continued run may change. Everything else decides the numbers of the run from its first step.
CONTINUABLE = (
    "steps",
    "checkpoint",
    "gradient_accumulation",
    "log",
    "profile",
    "sample",
    "eval",
    "guard.abort_after",
    "mesh",
    "data.path",
    "data.threads",
    "model.remat",
    "model.attention",
    "model.platform",
)


def base_config() -> ConfigDict:
    """Every field there is, with the paper's recipe as the default. A file in `configs/` starts from this.

    Model fields left at None come from `model.preset`; without a preset, from the defaults of `ModelConfig`.
    """
    config = ConfigDict()
    config.seed = 0  # initialization, data order, noise: everything random
    config.batch_size = 1024  # global, over all devices
    config.steps = 300_000  # parameter updates
    config.gradient_accumulation = 1  # parts a batch is cut into, one at a time, to save memory
    config.ema_decay = 0.9999
    config.label_dropout = 0.1  # fraction of labels replaced by the null class, for classifier-free guidance

    config.mask_ratio = 0.0  # fraction of tokens hidden from the trunk in training; needs model.decoder_depth
    config.mask_loss_weight = 0.1  # of the hidden tokens' loss beside the others'

    config.model = ConfigDict({"preset": placeholder(str)})
    kinds = {tuple: tuple, bool: bool, int: int, float: float, str: str}
    for field in dataclasses.fields(ModelConfig):
        config.model[field.name] = placeholder(kinds[type(field.default)])

    config.data = ConfigDict()
    config.data.name = "digits"  # digits | fashion_mnist | arrays | latents
    config.data.path = ""  # where the files are; "" for the source's own default
    config.data.split = "train"
    config.data.normalization = "paper"  # paper | manifest | vae: the constants latents are normalized with
    config.data.max_examples = 0  # so many, evenly spread over the set; 0 for all
    config.data.class_balance = False  # every class equally often
    config.data.threads = 1  # that read; they change no batch

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | muon
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "constant"  # constant | cosine | linear
    config.optimizer.warmup_steps = 0  # linear, from 0 to learning_rate
    config.optimizer.decay_steps = 0  # after the warm-up; cosine and linear only
    config.optimizer.end_learning_rate = 0.0  # where they end
    config.optimizer.clip_norm = 0.0  # global norm that gradients are cut to; 0 for never
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.01  # on every parameter

    config.guard = ConfigDict()  # steps whose loss or gradient is not finite are left out and counted
    config.guard.spike_factor = 0.0  # also those with a gradient norm this many times the running mean; 0 for never
    config.guard.abort_after = 10  # steps left out in a row after which the run ends

    config.time = ConfigDict()
    config.time.distribution = "logit_normal"  # logit_normal | uniform
    config.time.mean = 0.0  # of the logit; logit_normal only
    config.time.std = 1.0

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 5_000  # steps
    config.checkpoint.keep = 3  # newest checkpoints kept
    config.checkpoint.keep_every = 0  # steps; checkpoints at multiples of this are never deleted; 0 for none
    config.checkpoint.grace = 600.0  # seconds after SIGTERM in which the run must be saved, or it ends; 0 for no limit

    config.log = ConfigDict()
    config.log.every = 100  # steps; losses are means over this window
    config.log.wandb_project = ""  # also to this project of Weights & Biases (extra [wandb])

    config.profile = ConfigDict()  # steps recorded for TensorBoard's profile page
    config.profile.start = 10  # the first of them; compilation is over by then
    config.profile.steps = 0  # how many; 0 for none

    config.sample = ConfigDict()
    config.sample.every = 5_000  # steps; 0 for never
    config.sample.steps = 50  # velocity evaluations
    config.sample.guidance_scale = 1.5
    config.sample.per_class = 8  # images a class in the grid, for up to 10 classes
    config.sample.vae = ""  # folder or hub name of the VAE that decodes grids and evaluations of latents; "" for none

    config.eval = ConfigDict()  # metrics of samples from the moving average, against real images (docs/evaluation.md)
    config.eval.every = 0  # steps, and after the last; 0 for never
    config.eval.num_samples = 1_000  # for each guidance scale
    config.eval.guidance_scales = (1.0,)
    config.eval.solver = "euler"
    config.eval.steps = 50  # velocity evaluations
    config.eval.metrics = "fd"  # some of fd,sfd,is,precision,recall,kid
    config.eval.features = "inception"  # inception | efficientnet_lite0 | classifier:FILE | classifier (trained here)
    config.eval.inception = ""  # its weights; "" for where they usually are
    config.eval.preprocessing = "tensorflow"  # tensorflow | pytorch_fid: of inception, as the reference's
    config.eval.reference = ""  # images or saved statistics; "" for the run's own data, at most 50,000 of them
    config.eval.batch_size = 64  # samples at a time, on each process
    config.eval.classifier_steps = 500  # of features="classifier", trained on the run's data when first needed

    config.mesh = ConfigDict({"data": -1, "fsdp": 1})  # -1: all devices that are left
    return config.lock()


def defaults() -> dict[str, Any]:
    """Every field of `base_config` by its path, such as "optimizer.learning_rate", with its default."""
    return dict(leaves(base_config().to_dict()))


def shared_values(config: ConfigDict) -> dict[str, str]:
    """Config values that must match on every process: every field but the path of the data."""
    return {f"config.{path}": str(value) for path, value in leaves(config.to_dict()) if path != "data.path"}


def resolve(config: ConfigDict) -> FrozenConfigDict:
    """A complete, checked copy: model fields filled from the preset, every value possible.

    Raises:
        ConfigError: a field that cannot be; the message names it, its value and what was expected.
    """
    check_fields(config, base_config(), "config")
    expect(config, "model.preset", isinstance(config.model.preset, str | None), "the name of a preset, or None")
    resolved = ConfigDict(_with_floats(config.to_dict(), base_config().to_dict()))
    fields = {key: value for key, value in resolved.model.items() if key != "preset" and value is not None}
    model = preset_config(resolved.model.preset, **fields) if resolved.model.preset else ModelConfig().replace(**fields)
    with resolved.model.ignore_type():  # a size that was given as one number is a tuple now
        resolved.model.update(dataclasses.asdict(model))
    check_values(resolved)
    return FrozenConfigDict(resolved)


def model_config(config: FrozenConfigDict) -> ModelConfig:
    """The ModelConfig of a resolved config."""
    return ModelConfig(**{key: value for key, value in config.model.items() if key != "preset"})


def data_identity(data: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """`config.data` without what changes no example: that by which statistics of the data are known again."""
    return {name: value for name, value in data.to_dict().items() if name != "threads"}


def to_json(config: FrozenConfigDict | ConfigDict) -> str:
    """The config as indented JSON with sorted keys; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> FrozenConfigDict:
    """Inverse of `to_json`, checked again. A field that the version which wrote it did not have gets its default.

    So that older runs stay readable, the default of a field that is new must be what the code did without it, and a
    switch of a part that the model does not have, which could once be set, is left out.

    Raises:
        ConfigError: not JSON, or not a config of this version.
    """
    try:
        stored = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"not a JSON config ({error}).") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"expected a JSON object of config fields, got {type(stored).__name__}.")
    config = ConfigDict(_lists_to_tuples(_completed(stored, base_config().to_dict())))
    check_fields(config, base_config(), "config")
    leave_out_idle(config.model)
    return resolve(config)


def leave_out_idle(model: ConfigDict, keep: Collection[str] = ()) -> None:
    """Set the fields of `config.model` to None that are of parts which its model does not have, but for those to keep.

    Raises:
        ConfigError: an impossible model.
    """
    preset = PRESETS.get(model.preset, {}) if isinstance(model.preset, str) else {}
    given = {name: value for name, value in model.items() if name != "preset" and value is not None}
    needed = drop_unused({**preset, **given})
    with model.ignore_type():
        model.update({name: None for name in given if name not in needed and name not in keep})


def differences(stored: FrozenConfigDict, new: FrozenConfigDict) -> dict[str, tuple[Any, Any]]:
    """Fields in which two resolved configs differ, `{"model.depths": (stored, new)}`, those of CONTINUABLE left out."""
    before, after = dict(leaves(stored.to_dict())), dict(leaves(new.to_dict()))
    return {
        path: (before.get(path), after.get(path))
        for path in sorted({*before, *after})
        if before.get(path) != after.get(path) and not path.startswith(CONTINUABLE) and path != "model.preset"
    }


def _with_floats(config: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """With 0.0 where a number that need not be whole was given as 0, as ConfigDict has it where it knows the type."""
    found = dict(config)
    for name, default in base.items():
        if isinstance(default, dict):
            found[name] = _with_floats(config[name], default)
        elif isinstance(default, float):
            found[name] = float(config[name])
    return found


def _completed(stored: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """`stored` with what it lacks of `base`."""
    found = {**base, **stored}
    for name, default in base.items():
        if isinstance(default, dict) and isinstance(found[name], dict):
            found[name] = _completed(found[name], default)
    return found


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
