"""ResNet-50 with squeeze-excite on ImageNet for 300 epochs, by a modern recipe.

    python -m cnn_jax data prepare imagenet2012    # says what it needs
    python train.py --config configs/imagenet_modern_cnn.py

Procedure A2 of "ResNet strikes back" (Wightman et al. 2021, 2110.00476): LAMB, binary cross-entropy
with whole targets, RandAugment, mixup and cutmix, stochastic depth; with averaged weights, and
without its repeated augmentation.

Hardware: made for one host with 8 accelerators and some 64 CPU cores
Time: not known; nobody has run it here
Test accuracy: not measured here. It aims at 79 to 80 % of the validation images (top 1, one central
    crop): A2 has 79.8 % for ResNet-50.
"""

from configs import imagenet_resnet50


def get_config():
    config = imagenet_resnet50.get_config()
    config.batch_size = 2048
    config.num_epochs = 300
    config.model.name = "seresnet50"
    config.model.stochastic_depth_rate = 0.05
    config.data.eval_fraction = 0.95
    config.augment.random_operations = 2
    config.augment.magnitude = 21  # of 30: 7 of the 10 that timm counts
    config.augment.mixup_alpha = 0.1
    config.augment.cutmix_alpha = 1.0
    config.optimizer.name = "lamb"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.eps = 1e-6
    config.optimizer.weight_decay = 0.02
    config.loss.name = "binary_cross_entropy"
    config.loss.threshold = 0.2
    config.ema.decay = 0.9999
    return config
