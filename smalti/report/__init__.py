"""What people look at: image grids, charts, pages. Numbers and tensors in, files out."""
