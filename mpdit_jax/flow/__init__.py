"""Flow matching: the objective, solvers, guidance and the sampler."""
