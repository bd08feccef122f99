"""The core: a checkpoint is a set of global tensors, and each of them is a few strided views of bytes in files.  Pure.

extents, tensor     where bytes lie; View and Tensor: what a checkpoint holds, and where
params, names       the one table of parameters: every format's spelling, and what tensor parallelism cuts
index               local tensors of ranks -> global tensors
topology            degrees -> ranks, layers, folders
buckets, layout     the optimizer's buffers
plan, moves         boxes -> strided copies; stage, reshard: what each rank of a result holds
slots, fill         what each file to be written holds of the tensors, and proof that nothing is left out
training_step, stated, state    what is no tensor: time, arguments, parameter groups, scheduler
"""
