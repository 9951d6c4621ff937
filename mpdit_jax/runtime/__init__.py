"""The process: command line, signals, progress, hardware."""
