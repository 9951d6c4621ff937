"""The MPDiT model: levels, blocks, embeddings, presets, and parameter and multiply-add counts."""
