"""Conversion of weights from and to PyTorch and safetensors files."""
