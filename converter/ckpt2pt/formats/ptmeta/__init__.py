"""Make ``pt_meta``, so that nobody has to run a patched Megatron::

    any Megatron checkpoint of the model --capture, proof--.
                                                            >--> args, maps --files--> pt_meta/
    a description + MindSpore headers    --describe, synthesize--'

What is written is what :mod:`ckpt2pt.formats.ptmeta.metadata` reads; ``pt_meta/origin.json`` says how it came to be and what was assumed.
"""
