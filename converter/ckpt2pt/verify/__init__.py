"""Prove a result by reading it again, with no code of the writer::

source, pt_meta --expected--> what every slice, bucket, weight and key has to be
iter_0000500/   --leaves----> what they are            torch_reader: the same, told by real torch
examine       one rank, element by element
manifests     what the result tells of itself
imported      one rank of an import, by the tensors of the checkpoint
prove         all ranks, their manifests and the tracker
one, other      --compare---> any two checkpoints
"""
