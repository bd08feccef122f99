"""The operator: CheckpointConversion -> Indexed Job -> status.

Not built yet.  This package holds its place, so that the import contracts and the packaging are settled before the
first handler is written: it may use ``ckpt2pt.mapping`` and ``ckpt2pt.plan`` and none of the rooms that touch bytes.
"""
