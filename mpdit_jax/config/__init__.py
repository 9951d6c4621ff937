"""The config of an experiment: fields, checks, command-line flags, the rows of the paper's tables."""

from mpdit_jax.config.base import base_config as base_config
from mpdit_jax.config.base import data_identity as data_identity
from mpdit_jax.config.base import defaults as defaults
from mpdit_jax.config.base import differences as differences
from mpdit_jax.config.base import from_json as from_json
from mpdit_jax.config.base import model_config as model_config
from mpdit_jax.config.base import resolve as resolve
from mpdit_jax.config.base import shared_values as shared_values
from mpdit_jax.config.base import to_json as to_json
