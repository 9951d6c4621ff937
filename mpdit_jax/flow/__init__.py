"""Flow matching: objective, solvers, guidance, sampler."""
