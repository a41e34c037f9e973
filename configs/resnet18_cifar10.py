"""ResNet-18 on CIFAR-10, 200 epochs.

    python -m jaxtrain.main --config configs/resnet18_cifar10.py
    python -m jaxtrain.main --config configs/resnet18_cifar10.py:short     # 35 epochs, aimed at 94 %
    python -m jaxtrain.main --config configs/resnet18_cifar10.py:tuned     # aimed at more than 95 %

Neither argument was run at full length yet. `short`: a ResNet-18 of DAWNBench reached 94 % in 35 epochs with a rate that
rises and falls in lines (myrtle.ai, "How to train your ResNet", part 1). `tuned`: openmixup's ResNet-18 has 94.9 % after 200
epochs without mixing, 95.7 % with mixup (alpha 1), 96.1 % with cutmix (alpha 0.2).
"""

from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.recipes import change, recipe


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
    return recipe(config, arg, {"short": short, "tuned": tuned})


def short(config):
    """Batch 512 at a rate of 0.4, which rises for 7 epochs and falls for 28."""
    return change(
        config,
        **{"data.global_batch": 512, "optim.schedule": "linear", "optim.warmup": "7 epochs", "train.epochs": 35},
    )


def tuned(config):
    """Mixup or cutmix, one of them a batch, and the average of the weights."""
    return change(config, **{"data.mixup": 1.0, "data.cutmix": 0.2, "optim.ema": 0.999})
