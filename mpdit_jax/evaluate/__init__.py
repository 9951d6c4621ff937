"""How close generated images are to real ones: feature extractors, the distances over their features, the command."""
