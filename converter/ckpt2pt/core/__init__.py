"""The core: a checkpoint is a set of global tensors, and each of them is a few strided views of bytes in files.  Pure.

tensor   View and Tensor: what a checkpoint holds, and where
params   the one table of parameters: every format's spelling, and what tensor parallelism cuts
index    local tensors of ranks -> global tensors
slots    what each file to be written holds of the tensors, and proof that nothing is left out
state    what is no tensor: time, arguments, parameter groups, scheduler
"""
