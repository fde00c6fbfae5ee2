"""A small residual network on 10,000 images of Fashion-MNIST that ship with the package.

    python train.py --config configs/quickstart.py

Hardware: TO BE MEASURED
Time: TO BE MEASURED
Test accuracy: TO BE MEASURED (mean of 3 seeds, final epoch)
"""

from configs import default


def get_config():
    config = default.get_config()
    config.batch_size = 64
    config.num_epochs = 12
    config.model.stage_sizes = (1, 1, 1)
    config.model.width = 24
    config.model.stem = "medium"
    config.augment.crop_padding = 1
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-3
    config.loss.label_smoothing = 0.1
    config.log.every_steps = 50
    return config
