"""Swin-T on CIFAR-10 at 32 px (patch 2, window 4), from scratch.

    python -m jaxtrain.main --config configs/swin_tiny_cifar10.py
    python -m jaxtrain.main --config configs/swin_tiny_cifar10.py:tensor2 --simulate-devices 8 --config.train.steps=20

Regularized as in Liu 2021: RandAugment, random erasing, mixup 0.8, cutmix 1.0, label smoothing 0.1, drop-path 0.2.
"""

from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.recipes import recipe


def get_config(arg=""):
    """AdamW at 5e-4 for a batch of 128, cosine, 200 epochs."""
    config = Config(
        data=DataConfig(name="cifar10", global_batch=128, augmentation="heavy", mixup=0.8, cutmix=1.0),
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
        train=TrainConfig(epochs=200),
    )
    return recipe(config, arg)
