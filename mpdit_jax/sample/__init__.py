"""Drawing many images: blocks that outlive a crash, output files, pictures."""
