"""Weights as Hugging Face transformers reads and writes them.

core's tensors --families: class, names--> views of the same bytes --write--> model-0000X-of-0000Y.safetensors, index, config.json
config.json, index, *.safetensors --read--> core's tensors, arguments
"""
