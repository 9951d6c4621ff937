"""Ahead-of-time compilation for devices that this machine lacks: memory, traffic and a lower bound on the time."""
