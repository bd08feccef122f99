"""Carry out a CheckpointConversion on this machine: ``ckpt2pt run -f``::

document --runner--> the request that a worker would get --stages--> a record of each stage --> the same status
"""
