"""Carry out a CheckpointConversion on this machine: ``ckpt2pt run -f``::

document --runner--> the Job an operator would create --indexes--> a process for each index --board--> the terminal
"""
