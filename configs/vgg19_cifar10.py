"""VGG-19 on CIFAR-10, from scratch or from ImageNet's weights.

python -m jaxtrain.main --config configs/vgg19_cifar10.py           # 32 px, with BatchNorm
python -m jaxtrain.main --config configs/vgg19_cifar10.py:224       # 224 px: resized to 256, cropped to 224
python -m jaxtrain.main --config configs/vgg19_cifar10.py:finetune --config.model.init_from=vgg19.safetensors
python -m jaxtrain.main --config configs/vgg19_cifar10.py:finetune,probe --config.model.init_from=vgg19.safetensors
"""

from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.recipes import change, recipe


def get_config(arg=""):
    """`224`: the ImageNet pipeline and classifier, 20 epochs. `finetune`: that from given weights. `probe`: the head alone."""
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
    return recipe(config, arg, {"224": large, "finetune": finetune, "probe": probe})


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


def finetune(config):
    """From ImageNet's weights, with a new head: 10 epochs at a tenth of the rate, images normalized as the weights ask."""
    return change(
        large(config),
        **{
            "data.mean": (),
            "data.std": (),
            "model.init_from": "required",
            "optim.learning_rate": 0.001,
            "optim.head_rate": 10.0,
            "train.epochs": 10,
        },
    )


def probe(config):
    """All layers but the head stay as they are."""
    return change(config, **{"optim.freeze_layers": -1})
