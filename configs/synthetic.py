"""ResNet-50 on images that are made up: the speed of a machine and its data path, no accuracy.

    python train.py --config configs/synthetic.py

Hardware: an accelerator; on 2 CPU cores a step of 16 images takes several seconds.
Time: as long as you let it run; one epoch is 1,281,167 images of 224 x 224, as many as ImageNet's.
Test accuracy: the made-up classes are easy, so it says only that learning works.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.batch_size = 256
    config.num_epochs = 1
    config.precision = "bfloat16"
    config.model.name = "modern_cnn"
    config.data.name = "synthetic"
    config.data.mean = (0.5, 0.5, 0.5)
    config.data.std = (0.25, 0.25, 0.25)
    config.augment.crop_padding = 0
    config.schedule.warmup_epochs = 0.05
    config.loss.label_smoothing = 0.1
    config.eval.batch_size = 256
    config.eval.every_steps = 1000
    return config
