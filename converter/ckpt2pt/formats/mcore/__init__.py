"""Checkpoints of Megatron-LM 0.7 to 0.19 in the ``torch`` format, to be written.

order    which parameters a model chunk registers, in which order and under which names
tree     what is no tensor: arguments, groups, scheduler, random generators
write    the files of each rank as slots of global tensors
"""
