"""Bytes on disk, known to nobody above: atomic writes, documents that notice a change, tensors as safetensors."""
