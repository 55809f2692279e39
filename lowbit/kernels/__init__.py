"""Kernels for quantized models on GPUs; each is checked against `reference`, which is also what runs everywhere else."""
