"""A small residual network on 10,000 images of Fashion-MNIST that ship with the package.

    python train.py --config configs/quickstart.py

Hardware: 2 cores of an Intel Xeon (AVX-512), jax 0.10.2
Time: 65 to 67 s from the command to the summary
Test accuracy: 90.8 +- 0.3 % (mean and deviation of seeds 0, 1, 2, last epoch)
Both were measured before the head's bias began as torch's does (it was 0) and before the step had
derivatives of its own (docs/performance.md); seed 0 gives 90.60 % since, in 56 s on an AMD EPYC.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.batch_size = 64
    config.num_epochs = 12
    config.model.width = 24
    config.model.stem = "medium"
    config.augment.crop_padding = 1
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-3
    config.loss.label_smoothing = 0.1
    config.log.every_steps = 50
    return config
