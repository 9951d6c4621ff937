"""Conversion of a model between a workdir, a PyTorch file and a safetensors file."""
