"""From images to a store of latents."""
