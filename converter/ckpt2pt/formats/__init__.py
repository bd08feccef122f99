"""Formats: where the bytes of each global tensor lie, from headers alone.

registry    which format a folder is of
mindspore   rank_R/*.ckpt, *.safetensors, shards         -> Checkpoint
megatron    iter_N/mp_rank_*/*.pt of Megatron-LM 0.6 to 0.19 -> Checkpoint
"""
