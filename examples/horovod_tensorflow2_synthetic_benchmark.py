"""Measure training speed on made-up images in TensorFlow 2: a script for Horovod, but the import.

    mpirun -n 2 python examples/horovod_tensorflow2_synthetic_benchmark.py [--fp16-allreduce]

The model is a ResNet of Keras's, or any of ``keras.applications`` by its name, with random weights.
The last line says whether all ranks hold identical weights.
"""

import argparse
import hashlib
import os
import timeit

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

import hvdkit.tensorflow as hvd

parser = argparse.ArgumentParser(
    description="TensorFlow synthetic benchmark",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument(
    "--fp16-allreduce", action="store_true", help="gradients travel in half precision"
)
parser.add_argument("--model", default="MobileNetV2", help="one of keras.applications")
parser.add_argument("--batch-size", type=int, default=8, help="images in a batch of one rank")
parser.add_argument("--image-size", type=int, default=96, help="pixels along an edge")
parser.add_argument("--num-warmup-batches", type=int, default=5, help="batches that do not count")
parser.add_argument("--num-batches-per-iter", type=int, default=5, help="batches of an iteration")
parser.add_argument("--num-iters", type=int, default=5, help="iterations")
parser.add_argument("--no-cuda", action="store_true", help="do not use a GPU")


def weights_hash(model):
    digest = hashlib.sha256()
    for variable in model.trainable_variables:
        digest.update(variable.numpy().tobytes())
    return digest.hexdigest()[:16]


def main(args):
    # Horovod: initialize library.
    hvd.init()
    # Horovod: pin GPU to local rank.
    gpus = [] if args.no_cuda else tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.set_visible_devices(gpus[hvd.local_rank() % len(gpus)] if gpus else [], "GPU")
    # Horovod: limit the number of CPU threads of a rank.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    device = "GPU" if gpus else "CPU"

    keras.utils.set_random_seed(hvd.rank())
    shape = (args.image_size, args.image_size, 3)
    model = getattr(keras.applications, args.model)(weights=None, input_shape=shape)
    optimizer = keras.optimizers.SGD(0.01)
    loss_of = keras.losses.SparseCategoricalCrossentropy()
    data = tf.random.uniform([args.batch_size, *shape])
    target = tf.random.uniform([args.batch_size, 1], minval=0, maxval=999, dtype=tf.int64)
    # Horovod: (optional) compression algorithm.
    compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none

    # Horovod: broadcast initial variable states from rank 0 to all other processes.
    hvd.broadcast_variables(model.variables, root_rank=0)

    @tf.function
    def benchmark_step():
        with tf.GradientTape() as tape:
            loss = loss_of(target, model(data, training=True))
        # Horovod: add Horovod Distributed GradientTape.
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    def log(text):
        if hvd.rank() == 0:
            tqdm.write(text)

    log(f"Model: {args.model}")
    log(f"Batch size: {args.batch_size}")
    log(f"Number of {device}s: {hvd.size()}")
    log("Running warmup...")
    timeit.timeit(benchmark_step, number=args.num_warmup_batches)
    log("Running benchmark...")
    img_secs = []
    for number in tqdm(range(args.num_iters), unit="iter", disable=hvd.rank() != 0):
        seconds = timeit.timeit(benchmark_step, number=args.num_batches_per_iter)
        img_secs.append(args.batch_size * args.num_batches_per_iter / seconds)
        log(f"Iter #{number}: {img_secs[-1]:.1f} img/sec per {device}")

    # Horovod: results of all ranks.
    mean, confidence = np.mean(img_secs), 1.96 * np.std(img_secs)
    log(f"Img/sec per {device}: {mean:.1f} +-{confidence:.1f}")
    log(
        f"Total img/sec on {hvd.size()} {device}(s): "
        f"{hvd.size() * mean:.1f} +-{hvd.size() * confidence:.1f}"
    )
    # Horovod: compare the weights of all ranks.
    digest = weights_hash(model)
    identical = len(set(hvd.allgather_object(digest))) == 1
    verdict = "hold identical weights" if identical else "DIFFER in their weights"
    log(f"all {hvd.size()} ranks {verdict}: sha256 {digest}")
    if not identical:
        raise SystemExit(1)


if __name__ == "__main__":
    main(parser.parse_args())
