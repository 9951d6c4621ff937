"""Experiments whose results are in docs/. Each is one resumable command that writes a results file and a plot."""
