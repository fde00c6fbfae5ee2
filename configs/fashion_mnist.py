"""A small residual network on all 70,000 images of Fashion-MNIST (Xiao et al. 2017, 1708.07747).

    python train.py --config configs/fashion_mnist.py

The official files are downloaded. `--config.data.source_dir=DIR` takes them from a directory
instead, and Debian's package dataset-fashion-mnist is found by itself.

Hardware: TO BE MEASURED
Time: TO BE MEASURED
Test accuracy: TO BE MEASURED (mean of 3 seeds, final epoch)
"""

from configs import default


def get_config():
    config = default.get_config()
    config.batch_size = 256
    config.num_epochs = 10
    config.model.stage_sizes = (1, 1, 1)
    config.model.width = 32
    config.data.name = "fashion_mnist"
    config.optimizer.learning_rate = 0.2
    config.schedule.warmup_epochs = 1.0
    return config
