"""Devices and processes: mesh and sharding rules, start-up, collectives."""
