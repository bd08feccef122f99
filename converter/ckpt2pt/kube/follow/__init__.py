"""``ckpt2pt watch``: convert each new checkpoint of a running training as it becomes whole, and keep the last results."""
