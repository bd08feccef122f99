"""Torch's archives and the pickles inside them; nothing that a file names is ever imported or called.

tree --pickles--> bytes --archive--> where each record lies
file.pt --reader--> records --pickles--> tree
"""
