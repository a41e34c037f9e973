"""A small ResNet on the handwritten digits inside scikit-learn: real images, no download.

python -m jaxtrain.main --config configs/quickstart.py
"""

from jaxtrain.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.recipes import recipe


def get_config(arg=""):
    """1,797 images of 8x8 pixels, 10 classes; 20 epochs."""
    config = Config(
        data=DataConfig(name="digits", global_batch=64),
        model=ModelConfig(name="resnet18", width=16, depths=(1, 1, 1, 1)),
        optim=OptimConfig(
            name="sgd",
            learning_rate=0.1,
            lr_reference_batch=64,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            warmup="1 epoch",
        ),
        train=TrainConfig(epochs=20, log_every=20),
        checkpoint=CheckpointConfig(every="5 epochs"),
    )
    return recipe(config, arg)
