"""Training: state, step, optimizer, loop and what it reports."""
