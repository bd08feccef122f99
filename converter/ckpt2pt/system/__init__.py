"""The operating system: complete reads and writes, what volumes can do, and refusals in the user's words."""
