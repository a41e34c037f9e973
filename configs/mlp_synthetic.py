"""The MLP 784-512-256-10 on 10,000 synthetic examples: a smoke test for any machine.

python -m jaxtrain.main --config configs/mlp_synthetic.py
"""

from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.recipes import recipe


def get_config(arg=""):
    """AdamW at a rate of 0.001, batch 64, 10 epochs."""
    config = Config(
        data=DataConfig(name="synthetic", examples=10_000, global_batch=64),
        model=ModelConfig(name="mlp", width=512, dropout=0.3),
        optim=OptimConfig(name="adamw", learning_rate=0.001, lr_reference_batch=64, weight_decay=0.01),
        train=TrainConfig(epochs=10),
    )
    return recipe(config, arg)
