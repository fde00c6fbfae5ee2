"""A small residual network on 10,000 images of Fashion-MNIST that ship with the package.

    python train.py --config configs/quickstart.py

Hardware: TO BE MEASURED
Time: TO BE MEASURED
Test accuracy: TO BE MEASURED (mean of 3 seeds, final epoch)
"""

from configs import default


def get_config():
    config = default.get_config()
    config.batch_size = 128
    config.num_epochs = 10
    config.model.stage_sizes = (1, 1, 1)
    config.model.width = 32
    config.optimizer.learning_rate = 0.1
    config.schedule.warmup_epochs = 1.0
    return config
