"""Every key of a configuration, with its meaning, its unit and a sensible value.

Another configuration starts from this one and changes what it needs:

    from configs import default

    def get_config():
        config = default.get_config()
        config.optimizer.learning_rate = 0.05
        return config

It accepts any key so that a run reports all mistakes at once, misspelt keys among them.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> Any:  # a ConfigDict, whose attributes a type checker cannot know
    """Returns a ConfigDict of all keys, for a small network on images that the package brings."""
    config = ConfigDict(type_safe=False)

    config.seed = 0  # decides the first weights, the order of the images and their augmentation
    config.batch_size = 128  # images in a training step, over all devices together
    config.accumulate_steps = 1  # micro-batches of a training step, one after the other
    config.steps_per_call = 0  # steps that a resident set takes at once; 0: 10 on TPUs, else 1
    config.remat = "none"  # what is computed again in the backward pass: none, block or stage
    config.num_epochs = 10  # passes over the training images
    config.precision = "float32"  # of the computation: float32 or bfloat16; weights are float32

    # The model's arguments stand beside its name: for resnet_mini stage_sizes, width, stem, block,
    # norm, attention and more. The number of classes comes from the data set.
    config.model = ConfigDict(type_safe=False)
    config.model.name = "resnet_mini"  # a name in cnn_jax.models.MODELS

    config.init_from = ""  # weights to start from: .pth, .safetensors or a directory; empty: random
    config.init_ignore = ()  # parts that start at random all the same, such as ("head",)
    config.train_only = ()  # patterns of parameters, such as ("head", "stage4_.*"); empty: all

    config.data = ConfigDict(type_safe=False)
    config.data.name = "fashion_mnist_10k"  # a name in cnn_jax.data.datasets.NAMES
    config.data.train_split = "train"  # trained on; a slice such as train[:50%] will do
    config.data.test_split = "test"  # evaluated on
    config.data.holdout = 0.0  # percent of train_split, tested on instead of test_split; 0: none
    # Directories, or gs:// and s3:// URLs: docs/data.md.
    config.data.data_dir = ""  # where prepared data sets are kept; empty: TFDS's own default
    config.data.source_dir = ""  # where the files already lie; folder, csv, tar ... need it
    config.data.image_size = 0  # pixels of a side, where images are of many sizes; 0: 224
    config.data.crop_min_area = 0.08  # likewise: least share of an image in a random crop
    config.data.eval_fraction = 0.875  # likewise: the central crop's share of the shorter side
    config.data.progressive_sizes = ()  # sides that training images have first, in pixels
    config.data.progressive_epochs = ()  # the epochs at which each gives way to the next
    config.data.residency = "auto"  # device: all of it lies there; host: streamed; auto: if it fits
    config.data.memory_limit_mb = 1024  # MiB; a larger split is read from disk batch by batch
    config.data.num_threads = 2  # threads that make batches, on each host
    config.data.prefetch = 4  # batches made ahead of the step: at least 2, and one for each thread
    config.data.on_bad_record = "raise"  # or skip: the next good record stands in for a damaged one
    config.data.mean = (0.2860,)  # one for each channel, of pixels scaled to [0, 1]
    config.data.std = (0.3530,)  # likewise; images become (pixels / 255 - mean) / std

    config.augment = ConfigDict(type_safe=False)
    config.augment.crop_padding = 2  # pixels of random shift each way; 0: none
    config.augment.flip = True  # mirror half of the images left to right
    config.augment.alternate_flips = False  # instead: mirror each image in every other epoch
    config.augment.random_operations = 0  # RandAugment: operations on an image; 0: none
    config.augment.magnitude = 9  # RandAugment: strength of an operation, 0 to 30
    config.augment.brightness = 0.0  # times a factor of up to 1 -+ this; likewise the next two
    config.augment.contrast = 0.0  # of the distance from the mean grey
    config.augment.saturation = 0.0  # of the distance from the greys
    config.augment.hue = 0.0  # share of the colour circle that hues move by at most, up to 0.5
    config.augment.erase_probability = 0.0  # share of images that lose a rectangle
    config.augment.mixup_alpha = 0.0  # mixup with shares of a Beta(alpha, alpha); 0: none
    config.augment.cutmix_alpha = 0.0  # cutmix likewise; with both, half of the images each

    config.optimizer = ConfigDict(type_safe=False)
    config.optimizer.name = "sgd"  # sgd, adamw, lars, lamb or muon
    config.optimizer.learning_rate = 0.1  # the highest of the schedule
    config.optimizer.momentum = 0.9  # sgd, lars, muon: share of the last update kept
    config.optimizer.nesterov = True  # sgd, lars, muon: look ahead along the momentum
    config.optimizer.b1 = 0.9  # adamw, lamb, muon: decay of the mean gradient, a step
    config.optimizer.b2 = 0.999  # likewise of the mean squared gradient
    config.optimizer.eps = 1e-8  # likewise: added to the root of the mean squared gradient
    config.optimizer.weight_decay = 5e-4  # of kernels only; sgd: added to the gradient, as in torch
    config.optimizer.clip_norm = 0.0  # largest norm of the gradient, scaled down to it; 0: any
    config.optimizer.clip_ratio = 0.0  # largest norm as a share of the weights', by unit; 0: any

    config.schedule = ConfigDict(type_safe=False)
    config.schedule.name = "cosine"  # cosine, linear, step, one_cycle or constant
    config.schedule.warmup_epochs = 1.0  # epochs of rise from 0; fractions will do
    config.schedule.end_factor = 0.0  # the last learning rate as a share of the highest
    config.schedule.milestones = ()  # step: epochs at which the learning rate falls
    config.schedule.step_factor = 0.1  # step: what it is multiplied by at each

    config.loss = ConfigDict(type_safe=False)
    config.loss.name = "cross_entropy"  # or binary_cross_entropy, of each class by itself
    config.loss.label_smoothing = 0.0  # share of the label that is spread over all classes
    config.loss.threshold = 0.0  # binary: a class with a larger share is wanted whole; 0: as it is

    config.ema = ConfigDict(type_safe=False)
    config.ema.decay = 0.0  # share that an average of the weights keeps, a step; 0: no average

    config.batch_norm = ConfigDict(type_safe=False)
    config.batch_norm.statistics = "global"  # or device, its images alone; or group:N, N images

    config.mesh = ConfigDict(type_safe=False)
    config.mesh.data = -1  # devices that split the batch; -1: all that fsdp leaves
    config.mesh.fsdp = 1  # devices that split the weights as well as the batch

    config.eval = ConfigDict(type_safe=False)
    config.eval.batch_size = 1024  # images in an evaluation step, over all devices together
    config.eval.average_flips = False  # mean of the logits of an image and its mirror image
    config.eval.every_steps = 0  # training steps between evaluations; 0: at the end of each epoch

    config.checkpoint = ConfigDict(type_safe=False)
    config.checkpoint.every_steps = 0  # training steps between checkpoints; evaluations save too
    config.checkpoint.keep = 2  # newest checkpoints that stay, beside the best

    config.faults = ConfigDict(type_safe=False)
    config.faults.nan_check_every = 20  # steps within which a number that is not finite is found
    config.faults.on_nan = "stop"  # or rollback: go back to the last checkpoint, skip the bad steps
    config.faults.max_skipped = 10  # rollback: bad steps in a run, the next one stops it

    config.log = ConfigDict(type_safe=False)
    config.log.every_steps = 20  # training steps between two reports of loss and rate

    return config
