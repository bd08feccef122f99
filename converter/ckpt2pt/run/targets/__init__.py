"""Conversions from any format by global tensors: the source's index, and where each part of it goes.

source --formats.registry--> tensors, state --source--> a target's slots --mcore, torch_dist--> files --rank--> result --verify-->
"""
