"""A small residual network on CIFAR-10, in the manner of the races to 94 %.

    python train.py --config configs/cifar10.py

Alternating flips, shifts of 2 pixels, label smoothing, a rate that rises and falls along lines,
averaged weights, and the mean over an image and its mirror image, as in Jordan (2024, 2404.00498).

Hardware: made for one accelerator
Time: not known; nobody has run it here
Test accuracy: not measured here. It aims at 94 %, `test/accuracy_ema` of the last epoch: what
    Jordan's network and initialisation have after 9.9 epochs. This is a plain residual network,
    which has 24.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.batch_size = 512
    config.num_epochs = 24
    config.precision = "bfloat16"
    config.model.name = "resnet_mini"
    config.model.stem = "small"
    config.model.stage_sizes = (1, 1, 1)
    config.model.width = 64
    config.data.name = "cifar10"
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.augment.crop_padding = 2
    config.augment.flip = False
    config.augment.alternate_flips = True
    config.optimizer.learning_rate = 0.4
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "linear"
    config.schedule.warmup_epochs = 5.0
    config.loss.label_smoothing = 0.2
    config.ema.decay = 0.99
    config.eval.average_flips = True
    return config
