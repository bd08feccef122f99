"""Carry out a conversion: ranks in worker processes, published when they are complete."""
