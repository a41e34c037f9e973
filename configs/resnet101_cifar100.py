"""ResNet-101 on CIFAR-100, batch 64, 200 epochs.

python -m jaxtrain.main --config configs/resnet101_cifar100.py
"""

from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.recipes import recipe


def get_config(arg=""):
    """SGD at 0.1 for a batch of 128 (0.05 here), in steps."""
    config = Config(
        data=DataConfig(name="cifar100", global_batch=64, augmentation="light"),
        model=ModelConfig(name="resnet101"),
        optim=OptimConfig(
            name="sgd",
            learning_rate=0.1,
            lr_reference_batch=128,
            momentum=0.9,
            weight_decay=5e-4,
            schedule="step",
            warmup="1 epoch",
        ),
        train=TrainConfig(epochs=200),
    )
    return recipe(config, arg)
