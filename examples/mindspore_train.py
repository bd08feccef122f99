"""A training of a few steps with real mindspore on the CPU, and the hook that submits its conversion.

python examples/mindspore_train.py OUTPUT_DIR TEMPLATE [RANK]

The model is no Megatron model; what is shown is where the hook stands and what it does.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.dataset import GeneratorDataset
from mindspore.train import CheckpointConfig, Model, ModelCheckpoint

from ckpt2pt.hooks.mindspore import ConversionHook

STEPS = 4


def main() -> None:
    output, template = Path(sys.argv[1]), sys.argv[2]
    rank = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    network = nn.Dense(8, 4)
    data = [(np.ones((8,), np.float32), np.ones((4,), np.float32))] * (2 * STEPS)
    dataset = GeneratorDataset(data, ["x", "y"]).batch(2)
    model = Model(network, nn.MSELoss(), nn.Momentum(network.trainable_params(), 0.01, 0.9))
    config = CheckpointConfig(save_checkpoint_steps=2, keep_checkpoint_max=2, integrated_save=False)
    saving = ModelCheckpoint(f"network_rank_{rank}", str(output / f"rank_{rank}"), config)
    hook = ConversionHook(template, run="tiny-run", request_seconds=float(os.environ.get("REQUEST_SECONDS", "60")))
    model.train(1, dataset, callbacks=[saving, hook], dataset_sink_mode=False)  # the hook comes last
    print(f"rank {rank}: the training has ended normally")


if __name__ == "__main__":
    main()
