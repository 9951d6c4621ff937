"""What a run will need on machines that are not here: memory, traffic, a bound on its time."""
