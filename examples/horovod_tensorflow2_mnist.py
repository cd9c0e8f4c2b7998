"""Train a CNN on handwritten digits in a loop of TensorFlow 2: Horovod's script, but the import.

    mpirun -n 2 python examples/horovod_tensorflow2_mnist.py [--steps 300] [--use-adasum]

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
from tqdm import tqdm

import hvdkit.tensorflow as hvd

parser = argparse.ArgumentParser(
    description="Digits, trained with Horovod's API for TensorFlow 2",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--batch-size", type=int, default=32, help="training batch of one rank")
parser.add_argument("--steps", type=int, default=300, help="steps of one rank, of all in total")
parser.add_argument("--lr", type=float, default=0.002, help="learning rate of one rank")
parser.add_argument("--use-adasum", action="store_true", help="combine gradients by Adasum")
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
    for variable in model.variables:
        digest.update(variable.numpy().tobytes())
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
    train, (test_images, test_labels) = load_data()
    dataset = tf.data.Dataset.from_tensor_slices(train)
    # Horovod: every rank trains on its part of the data.
    dataset = dataset.shard(hvd.size(), hvd.rank())
    dataset = dataset.repeat().shuffle(1440, seed=hvd.rank()).batch(args.batch_size)

    model = build_model()
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Horovod: scale the learning rate by the number of ranks; Adasum needs no scaling.
    optimizer = keras.optimizers.Adam(args.lr if args.use_adasum else args.lr * hvd.size())

    @tf.function
    def training_step(images, labels, first_batch):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
        # Horovod: add Horovod Distributed GradientTape.
        tape = hvd.DistributedGradientTape(
            tape,
            op=hvd.Adasum if args.use_adasum else hvd.Average,
            compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
        )
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        # Horovod: broadcast initial variable states from rank 0 to all other processes, after the
        # first step, when the optimizer has its variables.
        if first_batch:
            hvd.broadcast_variables(model.variables, root_rank=0)
            hvd.broadcast_variables(optimizer.variables, root_rank=0)
        return loss

    # Horovod: fewer steps on more ranks.
    steps = args.steps // hvd.size()
    bar = tqdm(dataset.take(steps), total=steps, unit="step", disable=hvd.rank() != 0)
    for batch, (images, labels) in enumerate(bar):
        loss = training_step(images, labels, batch == 0)
        if batch % 10 == 0:
            bar.set_postfix(loss=f"{loss:.4f}")

    right = np.mean(np.argmax(model(test_images), axis=1) == test_labels)
    # Horovod: compare the weights of all ranks.
    digest = weights_hash(model)
    identical = len(set(hvd.allgather_object(digest))) == 1
    if hvd.rank() == 0:
        verdict = "hold identical weights" if identical else "DIFFER in their weights"
        print(f"accuracy {right:.2%}; all {hvd.size()} ranks {verdict}: sha256 {digest}")
    if not identical:
        raise SystemExit(1)


if __name__ == "__main__":
    main(parser.parse_args())
