"""VGG-19 on CIFAR-10, from scratch.

python -m jaxtrain.main --config configs/vgg19_cifar10.py           # 32 px, with BatchNorm
python -m jaxtrain.main --config configs/vgg19_cifar10.py:224       # 224 px: resized to 256, cropped to 224
"""

from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.recipes import change, recipe


def get_config(arg=""):
    """`224`: the ImageNet pipeline and classifier, without BatchNorm, 20 epochs."""
    config = Config(
        data=DataConfig(name="cifar10", global_batch=128, augmentation="light"),
        model=ModelConfig(name="vgg19_bn"),
        optim=OptimConfig(
            name="sgd",
            learning_rate=0.05,
            lr_reference_batch=128,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            schedule="cosine",
            warmup="1 epoch",
        ),
        train=TrainConfig(epochs=200),
    )
    return recipe(config, arg, {"224": large})


def large(config):
    """Batch 256 and the rate for it; the mean and standard deviation of ImageNet."""
    return change(
        config,
        **{
            "data.image_size": 224,
            "data.global_batch": 256,
            "data.augmentation": "resize_crop",
            "data.mean": (0.485, 0.456, 0.406),
            "data.std": (0.229, 0.224, 0.225),
            "model.name": "vgg19",
            "optim.learning_rate": 0.01,
            "optim.lr_reference_batch": 256,
            "train.epochs": 20,
        },
    )
