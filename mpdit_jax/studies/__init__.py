"""Measurements whose results are pages of docs/, made by a command each."""
