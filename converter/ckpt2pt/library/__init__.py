"""What ``import ckpt2pt`` offers: checkpoints as global tensors."""
