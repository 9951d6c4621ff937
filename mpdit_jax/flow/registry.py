"""The solvers by name."""

import dataclasses
from typing import Any

from mpdit_jax.errors import ConfigError
from mpdit_jax.flow.adaptive import Adaptive
from mpdit_jax.flow.flow_map import FlowMapSolver
from mpdit_jax.flow.solvers import DPMpp2M, Euler, Heun, Midpoint, Solver
from mpdit_jax.flow.stochastic import EulerMaruyama
from mpdit_jax.validation import suggest

SOLVERS: dict[str, Solver] = {
    "euler": Euler(),
    "heun": Heun(),
    "midpoint": Midpoint(),
    "dpmpp_2m": DPMpp2M(),
    "flow_map": FlowMapSolver(),
    "euler_maruyama": EulerMaruyama(),
    "dopri5": Adaptive("dopri5"),
    "tsit5": Adaptive("tsit5"),
}


def get_solver(solver: str | Solver, **options: Any) -> Solver:
    """Return the solver of that name, or the given solver, with fields replaced by `options`.

    Raises:
        ConfigError: unknown name, not a solver, or an option that the solver does not have.
    """
    if isinstance(solver, str):
        if solver not in SOLVERS:
            known = ", ".join(SOLVERS)
            raise ConfigError(f"unknown solver {solver!r}{suggest(solver, SOLVERS)}: expected one of {known}.")
        name, solver = solver, SOLVERS[solver]
    elif isinstance(solver, Solver) and not isinstance(solver, type):
        name = type(solver).__name__
    else:
        raise ConfigError(f"solver={solver!r}: expected one of {', '.join(SOLVERS)}, or an object with their solve().")
    if not options:
        return solver
    if not dataclasses.is_dataclass(solver) or isinstance(solver, type):
        raise ConfigError(f"solver {name!r} has no options: give {', '.join(options)} where you create it.")
    fields = [field.name for field in dataclasses.fields(solver) if field.name != "method"]
    for option, value in options.items():
        if option not in fields:
            known = f"its options are {', '.join(fields)}" if fields else "it has no options"
            raise ConfigError(f"{option}={value!r} is not an option of solver {name!r}: {known}.")
    return dataclasses.replace(solver, **options)
