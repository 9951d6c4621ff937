"""The base config of every experiment, its resolution into a complete config, and its stored form."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import placeholder

from mpdit_jax.config.checks import check_fields, check_values, expect, leaves
from mpdit_jax.errors import ConfigError
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.model.config import ModelConfig, drop_unused
from mpdit_jax.model.presets import PRESETS, preset_config

# Fields that a continued run may change. Every other field decides the numbers of the run from its first step.
# data.normalization may change by name only: data.json keeps its constants, which must stay the same.
CONTINUABLE = (
    "steps", "checkpoint", "gradient_accumulation", "log", "profile", "sample", "eval", "guard.abort_after", "mesh",
    "data.path", "data.normalization", "data.threads", "model.remat", "model.attention", "model.platform",
)  # fmt: skip


# Fields of `config.model` that may differ from the model in `config.init_from`.
ADAPTABLE = ("num_classes", "input_size", "dtype", "flow_map")
# Values of fields that older stored configs lack, where the behaviour then differs from today's default.
_BEFORE = {"ema": {"warmup": False}}


def base_config() -> ConfigDict:
    """Return every field there is, with the paper's recipe as the default. A file in `configs/` starts from this.

    Model fields left at None come from `model.preset`; without a preset, from the defaults of `ModelConfig`.
    """
    config = ConfigDict()
    config.seed = 0  # of initialization, data order, noise and everything else that is random
    config.batch_size = 1024  # examples per step over all devices
    config.steps = 300_000  # parameter updates
    config.gradient_accumulation = 1  # parts of a batch that are computed one after the other, to save memory
    config.ema_decay = 0.9999  # of the moving average of the parameters
    config.ema = ConfigDict({"warmup": True})  # whether the decay is at most (1 + step) / (10 + step)
    config.label_dropout = 0.1  # fraction of labels replaced by the null class, for classifier-free guidance

    config.objective = "flow_matching"  # flow_matching | flow_map: one evaluation jumps from t to r (docs/flow_map.md)
    config.init_from = ""  # weights to start from: a run's workdir (its moving average) or a file

    config.flow_map = ConfigDict()  # objective="flow_map" only
    config.flow_map.p = 1.0  # power of the adaptive weight of an example; 0 for the plain squared error
    config.flow_map.guidance = 0.0  # g: one pass acts as a guidance scale of 1 / (1 - g); or see model.guidance_max
    config.flow_map.guidance_until = 0.7  # largest t that is guided
    config.flow_map.start_times = (
        0.4,
        1.0,
    )  # mean and std of the logit of one time; t is the larger of two, r the smaller
    config.flow_map.end_times = (-1.2, 1.0)  # mean and std of the logit of the other time

    config.mask_ratio = 0.0  # fraction of tokens hidden from the trunk in training; needs model.decoder_depth
    config.mask_loss_weight = 0.1  # weight of the hidden tokens' loss
    config.trunk_drop = 0.0  # fraction of examples whose tail sees no trunk in training, for --guide=tail

    config.model = ConfigDict({"preset": placeholder(str)})  # fields of ModelConfig (mpdit_jax/model/config.py)
    kinds = {tuple: tuple, bool: bool, int: int, float: float, str: str}
    for field in dataclasses.fields(ModelConfig):
        config.model[field.name] = placeholder(kinds[type(field.default)])

    config.data = ConfigDict()
    config.data.name = "digits"  # digits | fashion_mnist | arrays | latents
    config.data.path = ""  # folder or file of the data; "" for the default of the source
    config.data.split = "train"  # part of the data set
    config.data.normalization = "auto"  # constants that normalize latents: auto | paper | manifest | vae
    config.data.max_examples = 0  # number of examples, evenly spread over the set; 0 for all
    config.data.class_balance = False  # draw every class equally often
    config.data.threads = 1  # reading threads; they change no batch

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | muon
    config.optimizer.learning_rate = 2e-4  # after the warm-up
    config.optimizer.schedule = "constant"  # constant | cosine | linear
    config.optimizer.warmup_steps = 0  # linear, from 0 to learning_rate
    config.optimizer.decay_steps = 0  # steps of the decay after the warm-up, for cosine and linear
    config.optimizer.end_learning_rate = 0.0  # after the decay
    config.optimizer.clip_norm = 0.0  # largest global norm of the gradients; 0 for no clipping
    config.optimizer.b1 = 0.9  # decay of the first moment
    config.optimizer.b2 = 0.999  # decay of the second moment
    config.optimizer.eps = 1e-8  # added to the root of the second moment
    config.optimizer.weight_decay = 0.01  # on every parameter

    config.guard = ConfigDict()  # steps whose loss or gradient is not finite are skipped and counted
    config.guard.spike_factor = 0.0  # also skip gradient norms above this multiple of the running mean; 0 for never
    config.guard.abort_after = 10  # skipped steps in a row that end the run

    config.time = ConfigDict()
    config.time.distribution = "logit_normal"  # logit_normal | uniform
    config.time.mean = 0.0  # of the logit, for logit_normal
    config.time.std = 1.0  # of the logit, for logit_normal

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 5_000  # steps between checkpoints
    config.checkpoint.keep = 3  # newest checkpoints that are kept
    config.checkpoint.keep_every = 0  # checkpoints at multiples of this step are never deleted; 0 for none
    config.checkpoint.grace = 600.0  # seconds after SIGTERM within which the run is saved, or it ends; 0 for no limit

    config.log = ConfigDict()
    config.log.every = 100  # steps between log lines; losses are means over them
    config.log.wandb_project = ""  # project of Weights & Biases to log to as well (extra [wandb])

    config.profile = ConfigDict()  # steps recorded for TensorBoard's profile page
    config.profile.start = 10  # steps before the recording, so that compilation is not recorded
    config.profile.steps = 0  # number of recorded steps; 0 for none

    config.sample = ConfigDict()
    config.sample.every = 5_000  # steps between image grids; 0 for never
    config.sample.solver = "euler"  # "flow_map" for a flow map
    config.sample.steps = 50  # velocity evaluations
    config.sample.guidance_scale = 1.5  # 1.0 for no guidance
    config.sample.per_class = 8  # images per class in the grid, for up to 10 classes
    config.sample.vae = ""  # folder or hub name of the VAE that decodes grids and evaluations of latents; "" for none

    config.eval = ConfigDict()  # metrics of samples from the moving average, against real images (docs/evaluation.md)
    config.eval.every = 0  # steps between evaluations, and one after the last step; 0 for never
    config.eval.num_samples = 1_000  # for each guidance scale
    config.eval.guidance_scales = (1.0,)  # one evaluation each
    config.eval.solver = "euler"  # solver of the samples
    config.eval.steps = 50  # velocity evaluations
    config.eval.metrics = "fd"  # some of fd,sfd,is,precision,recall,kid
    config.eval.features = "inception"  # inception | efficientnet_lite0 | classifier:FILE | classifier (trained here)
    config.eval.inception = ""  # file of Inception's weights; "" for the usual places
    config.eval.preprocessing = "tensorflow"  # resizing for Inception: tensorflow | pytorch_fid
    config.eval.reference = ""  # images or saved statistics; "" for the run's own data, at most 50,000 of them
    config.eval.batch_size = 64  # samples at a time on each process
    config.eval.classifier_steps = 500  # training steps of features="classifier"

    config.mesh = ConfigDict({"data": -1, "fsdp": 1})  # devices on each axis; -1 for all that are left
    return config.lock()


def defaults() -> dict[str, Any]:
    """Return every field of `base_config` by its path, such as "optimizer.learning_rate", with its default."""
    return dict(leaves(base_config().to_dict()))


def shared_values(config: ConfigDict) -> dict[str, str]:
    """Config values that must match on every process: every field but the path of the data."""
    return {f"config.{path}": str(value) for path, value in leaves(config.to_dict()) if path != "data.path"}


def resolve(config: ConfigDict) -> FrozenConfigDict:
    """Check a config and return a complete copy, with the model fields of the preset filled in.

    Raises:
        ConfigError: an impossible field; the message names it, its value and what was expected.
    """
    check_fields(config, base_config(), "config")
    expect(config, "model.preset", isinstance(config.model.preset, str | None), "the name of a preset, or None")
    resolved = ConfigDict(_with_floats(config.to_dict(), base_config().to_dict()))
    fields = {key: value for key, value in resolved.model.items() if key != "preset" and value is not None}
    model = preset_config(resolved.model.preset, **fields) if resolved.model.preset else ModelConfig().replace(**fields)
    with resolved.model.ignore_type():  # a size given as one number is a tuple now
        decided = {"flow_map": resolved.objective == "flow_map", "null_class": resolved.label_dropout > 0}
        _check_decided(resolved, decided)
        resolved.model.update(dataclasses.asdict(model.replace(**decided)))
    check_values(resolved)
    return FrozenConfigDict(resolved)


def _check_decided(config: ConfigDict, decided: Mapping[str, bool]) -> None:
    """Raise ConfigError where a field of config.model contradicts what the objective and label_dropout decide."""
    for name, value in decided.items():
        said = config.model[name]
        if said is not None and bool(said) != value:
            by = "config.objective" if name == "flow_map" else "config.label_dropout"
            raise ConfigError(f"config.model.{name}={said!r}: leave it out, {by} decides it and gives {value}.")


def model_config(config: FrozenConfigDict) -> ModelConfig:
    """Return the ModelConfig of a resolved config."""
    return ModelConfig(**{key: value for key, value in config.model.items() if key != "preset"})


def data_identity(data: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """Return the fields of `config.data` that decide the examples. Statistics of the data are stored under them."""
    return {name: value for name, value in data.to_dict().items() if name != "threads"}


def to_json(config: FrozenConfigDict | ConfigDict) -> str:
    """Return the config as indented JSON with sorted keys; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> FrozenConfigDict:
    """Invert `to_json` and check the config again. A missing field gets the value of `_BEFORE` or today's default.

    Raises:
        ConfigError: not JSON, or not a config of this version.
    """
    try:
        stored = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"not a JSON config ({error}).") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"expected a JSON object of config fields, got {type(stored).__name__}.")
    config = ConfigDict(_lists_to_tuples(_complete(_complete(stored, _BEFORE), base_config().to_dict())))
    return resolve(config)


def clear_unused(model: ConfigDict, keep: Collection[str] = ()) -> None:
    """Set to None every field of `config.model` that the model does not use, except those in `keep`.

    Raises:
        ConfigError: an impossible model.
    """
    preset = PRESETS.get(model.preset, {}) if isinstance(model.preset, str) else {}
    given = {name: value for name, value in model.items() if name != "preset" and value is not None}
    needed = drop_unused({**preset, **given})
    with model.ignore_type():
        model.update(dict.fromkeys({*given} - {*needed} - {*keep}))


def differences(stored: FrozenConfigDict, new: FrozenConfigDict) -> dict[str, tuple[Any, Any]]:
    """Fields in which two resolved configs differ, `{"model.depths": (stored, new)}`, without those of CONTINUABLE."""
    before, after = dict(leaves(stored.to_dict())), dict(leaves(new.to_dict()))
    return {
        path: (before.get(path), after.get(path))
        for path in sorted({*before, *after})
        if before.get(path) != after.get(path) and not path.startswith(CONTINUABLE) and path != "model.preset"
    }


def _with_floats(config: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in which whole numbers of fields of type float are floats."""
    found = dict(config)
    for name, default in base.items():
        if isinstance(default, dict):
            found[name] = _with_floats(config[name], default)
        elif isinstance(default, float):
            found[name] = float(config[name])
    return found


def _complete(stored: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """`stored`, and the fields of `base` that it lacks."""
    found = {**base, **stored}
    for name, default in base.items():
        if isinstance(default, dict) and isinstance(found[name], dict):
            found[name] = _complete(found[name], default)
    return found


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
