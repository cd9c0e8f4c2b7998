"""Train a CNN on handwritten digits with Keras's `fit`: a script for Horovod, but for its imports.

    mpirun -n 2 python examples/horovod_keras_mnist.py [--epochs 8] [--fp16-allreduce]

The 1797 digits ship inside scikit-learn.  The last line says how many of the test digits were
recognised, and whether all ranks hold identical weights.
"""

import argparse
import hashlib
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import hvdkit.keras as hvd

parser = argparse.ArgumentParser(
    description="Digits, trained with Horovod's API for Keras",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--batch-size", type=int, default=32, help="training batch of one rank")
parser.add_argument("--epochs", type=int, default=8, help="epochs to train")
parser.add_argument("--lr", type=float, default=0.002, help="learning rate of one rank")
parser.add_argument("--warmup-epochs", type=int, default=2, help="epochs to come up to it")
parser.add_argument(
    "--fp16-allreduce", action="store_true", help="gradients travel in half precision"
)


def load_data():
    """Return training and test images, float32 (n, 8, 8, 1), and labels."""
    digits = load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype(np.float32)
    order = np.random.default_rng(7).permutation(len(images))
    train, test = order[:1440], order[1440:]
    return (images[train], digits.target[train]), (images[test], digits.target[test])


def build_model():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dropout(0.25),
            keras.layers.Dense(10),
        ]
    )


def weights_hash(model):
    digest = hashlib.sha256()
    for weights in model.get_weights():
        digest.update(weights.tobytes())
    return digest.hexdigest()[:16]


def main(args):
    # Horovod: initialize library.
    hvd.init()
    # Horovod: pin GPU to local rank.
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if gpus:
        tf.config.set_visible_devices(gpus[hvd.local_rank() % len(gpus)], "GPU")
    # Horovod: limit the number of CPU threads of a rank.
    tf.config.threading.set_intra_op_parallelism_threads(1)

    keras.utils.set_random_seed(hvd.rank())
    (images, labels), test = load_data()
    # Horovod: every rank trains on its part of the data.
    images, labels = images[hvd.rank() :: hvd.size()], labels[hvd.rank() :: hvd.size()]

    model = build_model()
    # Horovod: scale the learning rate by the number of ranks.
    scaled_lr = args.lr * hvd.size()
    optimizer = keras.optimizers.Adam(scaled_lr)
    # Horovod: wrap the optimizer.
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
    )
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    callbacks = [
        # Horovod: broadcast initial variable states from rank 0 to all other processes.
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        # Horovod: average metrics among workers at the end of every epoch.
        hvd.callbacks.MetricAverageCallback(),
        # Horovod: come up to the scaled learning rate during the first epochs.
        hvd.callbacks.LearningRateWarmupCallback(
            initial_lr=scaled_lr, warmup_epochs=args.warmup_epochs
        ),
    ]
    model.fit(
        images,
        labels,
        batch_size=args.batch_size,
        # Horovod: the same number of steps on every rank.
        steps_per_epoch=1440 // hvd.size() // args.batch_size,
        epochs=args.epochs,
        callbacks=callbacks,
        # Horovod: show progress on worker 0.
        verbose=1 if hvd.rank() == 0 else 0,
    )

    accuracy = model.evaluate(*test, verbose=0)[1]
    # Horovod: compare the weights of all ranks.
    digest = weights_hash(model)
    hashes = hvd.allgather(np.frombuffer(bytes.fromhex(digest), np.uint8)[np.newaxis])
    identical = bool((np.asarray(hashes) == np.asarray(hashes)[0]).all())
    if hvd.rank() == 0:
        verdict = "hold identical weights" if identical else "DIFFER in their weights"
        print(f"accuracy {accuracy:.2%}; all {hvd.size()} ranks {verdict}: sha256 {digest}")
    if not identical:
        raise SystemExit(1)


if __name__ == "__main__":
    main(parser.parse_args())
