"""Programs beside ``ckpt2pt`` itself: the plugin of kubectl, and the reference's scripts by their names."""
