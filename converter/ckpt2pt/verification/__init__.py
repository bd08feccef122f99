"""Prove a result by reading it again, with no code of planner or writer::

source --source, sharded--> (role, name): tensor -+
                                                   +--tensors--> every element        structure: all that is no tensor
result --its own reader---> (role, name): tensor -+
prove         one rank of a conversion, all ranks with their records (manifests); torch_reader: torch's opinion
imported      one rank of an import
one, other    --compare, across--> any two checkpoints
"""
