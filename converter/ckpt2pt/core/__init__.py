"""The core: a checkpoint is a set of global tensors, and each of them is a few strided views of bytes in files.  Pure.

tensor   View and Tensor: what a checkpoint holds, and where
params   the one table of parameters: every format's spelling, and what tensor parallelism cuts
index    local tensors of ranks -> global tensors
"""
