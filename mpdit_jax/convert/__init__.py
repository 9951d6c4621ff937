"""One model between the forms it is kept in: a workdir, a PyTorch file, a safetensors file."""
