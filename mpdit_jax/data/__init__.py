"""Data sets, the protocol of image sets, the store of latents and the input pipeline."""
