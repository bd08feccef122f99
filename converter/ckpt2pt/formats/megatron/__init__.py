"""Megatron-LM checkpoints: headers, optimizer files, trees inside the archives, what a resume needs."""
