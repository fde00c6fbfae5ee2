"""`train.py` that hangs in its first step: `python hanging.py WHERE FLAGS OF TRAIN.PY`.

WHERE is `data`, `device` or `interpreter`; or `memory`: a thread finds none for the 13th batch.
"""

import ctypes
import sys
import threading
import time

import jax

from cnn_jax import plan
from cnn_jax.__main__ import run
from cnn_jax.data.sources import MemorySource
from cnn_jax.training.augment import make_augment

calls = 0


def hang_in_the_data():
    threading.Event().wait()


def run_out_of_memory():
    raise MemoryError("no room for a batch")


def hang_with_the_interpreter():
    ctypes.PyDLL(None).sleep(3600)  # unlike CDLL it keeps every other Python thread waiting


def make_hanging_source(hang, after):
    class Hanging(MemorySource):
        def batch(self, indices, epochs=None):
            global calls
            calls += len(indices) == 64 and self.split.startswith("train[:512]")
            if calls > 1 + after:  # the first was the fingerprint's
                hang()
            return super().batch(indices, epochs)

    def open_source(*arguments, **options):
        source = opened(*arguments, **options)
        return Hanging(source.info, source.split, source.images, source.labels)

    opened = plan.open_source
    return open_source


def make_hanging_augment(**options):
    augment = make_augment(**options)

    def hang_on_the_device(images):
        time.sleep(3600)

    def hanging(images, *others):
        return jax.pure_callback(hang_on_the_device, images, augment(images, *others))

    return hanging


if __name__ == "__main__":
    if sys.argv[1] == "device":
        plan.make_augment = make_hanging_augment
    else:
        hang, after = {
            "data": (hang_in_the_data, 0),
            "interpreter": (hang_with_the_interpreter, 0),
            "memory": (run_out_of_memory, 12),
        }[sys.argv[1]]
        plan.open_source = make_hanging_source(hang, after)
    run(["train", *sys.argv[2:]])
