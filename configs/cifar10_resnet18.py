"""ResNet-18 on CIFAR-10, the recipe that papers on regularisation start from.

    python train.py --config configs/cifar10_resnet18.py

Random shifts of 4 pixels and mirror images, a rate that falls to a fifth three times, no more, as
in DeVries and Taylor (2017, 1708.04552). The first convolution is of 3x3 and stride 1.

Hardware: made for one accelerator
Time: not known; nobody has run it here
Test accuracy: not measured here. It aims at what that paper has for this network, data and rate
    without cutout: 95.28 +- 0.21 % at the last epoch (an error of 4.72 %). Theirs is float32, and
    its biases and norms decay too.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.batch_size = 128
    config.num_epochs = 200
    config.precision = "bfloat16"
    config.model.name = "resnet18"
    config.model.stem = "small"
    config.data.name = "cifar10"
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.augment.crop_padding = 4
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "step"
    config.schedule.warmup_epochs = 0.0
    config.schedule.milestones = (60, 120, 160)
    config.schedule.step_factor = 0.2
    config.log.every_steps = 100
    return config
