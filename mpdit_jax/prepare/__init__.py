"""The command `prepare`: from images to a store of latents."""
