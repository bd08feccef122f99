"""Rows of the vocabulary in another layout: tokens, filled up to a multiple that grows with the tensor parallel size.  Pure.

Megatron-LM cac60ce4, megatron/tokenizer/tokenizer.py, ``_vocab_size_with_padding``; the same up to core_v0.19.0.
"""

from __future__ import annotations

from collections.abc import Mapping


def padded_rows(tokens: object, held: int, multiple: int) -> int:
    """Rows for ``tokens``, or for the ``held`` rows of the source where these are not known or more."""
    known = tokens if type(tokens) is int and 0 < tokens <= held else held
    return -(-known // multiple) * multiple


def vocabulary_rows(args: Mapping[str, object], held: int, tensor: int) -> int:
    """Rows of the embedding on ``tensor`` ranks together, by training arguments; ``held`` are those of the source.

    Where the arguments do not say how it is padded, it stays as it is.
    """
    stated, degree = args.get("padded_vocab_size"), args.get("tensor_model_parallel_size")
    if type(stated) is int and degree in {None, tensor}:
        return stated
    divisor = args.get("make_vocab_size_divisible_by")
    if type(divisor) is not int or divisor < 1:
        return held
    return padded_rows(args.get("vocab_size"), held, divisor * tensor)
