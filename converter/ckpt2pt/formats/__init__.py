"""Formats: where the bytes of each global tensor lie, from headers alone; and how files of each format are laid out.

registry    which format a folder is of
families    what is not read: its name, and what its owner does next
mindspore   rank_R/*.ckpt, *.safetensors, shards
megatron    iter_N/mp_rank_*/*.pt of Megatron-LM 0.6 to 0.19
msadapter   the same of MSAdapter, in archives of a dialect; repaired: the files of torch in their place
ptmeta      what a Megatron run says of itself: arguments and param maps, read and made
torchfile   the archives and pickles of torch, inert
"""
