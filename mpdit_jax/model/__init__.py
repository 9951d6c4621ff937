"""The model: levels, blocks, embeddings, and what they cost."""
