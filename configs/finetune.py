"""ResNet-50 on your own images, from weights of ImageNet: a folder with a folder of each class.

    python -m cnn_jax convert resnet50.pth --model resnet50 --to weights/resnet50
    python train.py --config configs/finetune.py --config.data.source_dir=DIR

DIR holds CLASS/IMAGE.jpg; the last tenth in an order without meaning is held out. Where DIR holds
train/CLASS and val/CLASS, set data.train_split=train and data.test_split=val.
`--config.train_only=head` trains the head alone, for few images or a slow machine.

Hardware: made for one accelerator; on CPU cores, train the head alone
Time: not known; nobody has run it here
Test accuracy: depends on the images, so there is no figure to aim at; none was measured
"""

from configs import default


def get_config():
    config = default.get_config()
    config.batch_size = 64
    config.num_epochs = 20
    config.model.name = "resnet50"
    config.init_from = "weights/resnet50"
    config.init_ignore = ("head",)
    config.data.name = "folder"
    config.data.train_split = "train[:90%]"
    config.data.test_split = "train[90%:]"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.augment.crop_padding = 0
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 1e-4
    config.loss.label_smoothing = 0.1
    config.eval.batch_size = 64
    return config
