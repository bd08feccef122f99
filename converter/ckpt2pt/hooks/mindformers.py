"""Importing this makes ``ConversionHook`` known to MindFormers, for ``callbacks: [{type: ConversionHook, ...}]`` in its YAML.

MindFormers sorts its own callbacks to the front, CheckpointMonitor among them, so that the hook comes after it
(mindformers/trainer/base_trainer.py).
"""

# mindformers is not there where types are checked.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUntypedBaseClass=false

from __future__ import annotations

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from ckpt2pt.hooks.mindspore import ConversionHook

MindFormerRegister.register(MindFormerModuleType.CALLBACK)(ConversionHook)
