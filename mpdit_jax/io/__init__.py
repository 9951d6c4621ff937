"""Files: atomic writes, locks, pictures, .npz and IDX."""
