"""The road back, from Megatron to MindSpore and ``pt_meta``: the same rooms in the other order.

mp_rank_*/*.pt --survey--> entries --run--> rank_R/network.ckpt, pt_meta/
"""
