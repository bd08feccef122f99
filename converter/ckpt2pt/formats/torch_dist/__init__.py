"""Megatron-LM's distributed checkpoint (``torch_dist``), read without torch.

iter_0000500/.metadata        the tensors, and which item of which file holds each chunk of them     metadata
             __0_0.distcp     items, each an archive of torch.save: a chunk of a tensor, or an object  items
             common.pt        what is no tensor; since 0.19 an object, ``common_state/shard_0_1``      common
             metadata.json    the format and its version
"""
