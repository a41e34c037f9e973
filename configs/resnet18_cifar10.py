"""ResNet-18 on CIFAR-10, 200 epochs.

python -m jaxtrain.main --config configs/resnet18_cifar10.py
"""

from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.recipes import recipe


def get_config(arg=""):
    """SGD at 0.1 for a batch of 128, cosine."""
    config = Config(
        data=DataConfig(name="cifar10", global_batch=128, augmentation="light"),
        model=ModelConfig(name="resnet18"),
        optim=OptimConfig(
            name="sgd",
            learning_rate=0.1,
            lr_reference_batch=128,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            schedule="cosine",
            warmup="1 epoch",
        ),
        train=TrainConfig(epochs=200),
    )
    return recipe(config, arg)
