"""Conversions as documents, Jobs and workers, and the request that a document stands for."""
