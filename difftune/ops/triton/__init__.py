"""Fused differential attention in Triton: forward, backward, and how they are registered with torch.

Nothing here is imported before the backend is asked for, so that the package runs without Triton. The derivation, with
all counts, stands in docs/kernels.md.
"""
