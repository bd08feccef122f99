"""Import: from Megatron to MindSpore and ``pt_meta``, the other direction.

mp_rank_*/*.pt --survey--> entries --run--> rank_R/network.ckpt, pt_meta/
"""
