"""ResNet-50 on ImageNet in 90 epochs, as published.

    python -m cnn_jax data prepare imagenet2012    # says what it needs
    python train.py --config configs/imagenet_resnet50.py

Hardware: made for one host with 8 accelerators and some 64 CPU cores
Time: not known; nobody has run it here
Test accuracy: not measured here. It aims at what is published for 90 epochs, 76.1 to 76.8 % of the
    validation images (top 1, one central crop): torchvision's ResNet50_Weights.IMAGENET1K_V1 has
    76.13 %. The batch, the rate and the warm-up are those of Goyal et al. (2017, 1706.02677); the
    rate falls as a cosine rather than in steps.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.batch_size = 1024
    config.num_epochs = 90
    config.precision = "bfloat16"
    config.model.name = "resnet50"
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.num_threads = 16
    config.data.prefetch = 8
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.augment.crop_padding = 0
    config.optimizer.learning_rate = 0.4  # 0.1 for each 256 images
    config.optimizer.weight_decay = 1e-4
    config.schedule.warmup_epochs = 5.0
    config.eval.batch_size = 1024
    config.log.every_steps = 50
    return config
