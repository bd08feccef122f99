"""Checkpoints of MindFormers (MindSpore Transformers), of either trainer, as core's tensors.

folder      which folder holds an iteration, and which files it has
metadata    metadata.json: global shapes, and which file holds which part
flags       what nothing in the files tells: the layouts of fused weights
layouts     a fused parameter of theirs -> parameters of the canonical table, as regions of it
read        all of it, proved to fit together
write       weights as MindFormers loads them
ready       which iteration is complete while a training goes on
"""
