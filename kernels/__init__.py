"""The mathematics of hypersam: codecs, products with compressed weights, and the file format.

This room imports no other room of the project. It needs torch, safetensors and, for GPUs, triton; the names
live in its modules, so that whoever needs only the errors does not wait for torch.
"""
