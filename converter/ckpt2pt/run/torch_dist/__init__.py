"""Conversion into Megatron's torch_dist, from any format: each worker writes a ``.distcp``, the last to finish joins them."""
