"""Files: atomic writes, the locked folder, pictures, JSON, .npz and IDX."""
