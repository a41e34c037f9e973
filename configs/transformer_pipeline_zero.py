"""Swin-T on CIFAR-10 in two pipeline stages, each data-parallel over two devices with ZeRO-2: stages and ZeRO together.

    python -m jaxtrain.main --config configs/transformer_pipeline_zero.py                          # four GPUs
    python -m jaxtrain.main --config configs/transformer_pipeline_zero.py --simulate-devices 4     # or four CPU devices

A global batch of 128, 32 for each of the four devices, in eight microbatches.
"""

from jaxtrain.config import Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.recipes import recipe


def get_config(arg=""):
    """Takes the layout arguments only; its own layout is two stages x two devices."""
    config = Config(
        data=DataConfig(name="cifar10", global_batch=128, augmentation="heavy", mixup=0.2, cutmix=1.0),
        model=ModelConfig(name="swin_tiny", drop_path=0.2),
        optim=OptimConfig(
            name="adamw",
            learning_rate=5e-4,
            lr_reference_batch=128,
            weight_decay=0.05,
            schedule="cosine",
            warmup="10 epochs",
            clip_norm=5.0,
            label_smoothing=0.1,
        ),
        train=TrainConfig(epochs=100),
        layout=LayoutConfig(stages=2, zero=2, microbatches=8),
    )
    return recipe(config, arg)
