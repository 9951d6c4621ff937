"""Experiments whose results are in docs/: each one command, resumable, with its figures as a file and a plot."""
