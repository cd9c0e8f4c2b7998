"""Train a CNN of Keras layers, sharded over ranks, on handwritten digits.

    mpirun -n 4 python examples/tensorflow_pipeline.py --data 2 --pipeline 2 [--epochs 4]

The layers are shared out over --pipeline ranks; --data such pipelines take their share of each
batch.  However many ranks there are, the losses are the same to float32 rounding.  At the end: the
test accuracy, and whether the replicas of every layer are bitwise identical.  The data ships inside
scikit-learn.
"""

import argparse
import hashlib

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from tqdm import tqdm

import hvdkit.tensorflow as hvd

GLOBAL_BATCH = 60


def load_data():
    """Return training and test images, float32 (n, 8, 8, 1), and labels."""
    digits = load_digits()
    images = (digits.images.astype(np.float32) / 8 - 1)[..., None]
    order = np.random.default_rng(7).permutation(len(images))
    train, test = order[:1440], order[1440:]
    return images[train], digits.target[train], images[test], digits.target[test]


def layers_of_the_model():
    """Return the input, and what makes each layer: no rank makes the weights of all.

    They are without kinks, so that a difference in the last bit of a sum stays small.
    """
    return [
        keras.Input((8, 8, 1)),
        lambda: layers.Conv2D(32, 3, padding="same", activation="gelu"),
        lambda: hvd.Stash("around"),
        lambda: layers.Conv2D(32, 3, padding="same", activation="gelu"),
        lambda: layers.Conv2D(32, 3, padding="same"),
        lambda: hvd.Pop("around"),
        lambda: layers.AveragePooling2D(2),
        layers.Flatten,
        lambda: layers.Dense(128, activation="gelu"),
        lambda: layers.Dense(10),
    ]


def train(model, optimizer, images, labels, *, epochs, steps):
    """Train on this rank's share of every batch; return the losses, one a step."""
    places, place = model.mesh.size_of("data"), model.mesh.place("data")
    batches = len(images) // GLOBAL_BATCH
    total = min(epochs * batches, steps or epochs * batches)
    losses = []
    with tqdm(total=total, unit="step", disable=hvd.rank() != 0) as bar:
        for number in range(total):
            epoch, step = divmod(number, batches)
            order = np.random.default_rng(epoch).permutation(len(images))  # on all ranks the same
            batch = order[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
            share = batch[place::places]
            losses.append(model(images[share], labels[share]))
            model.clip_by_global_norm(1.0)
            model.apply_gradients(optimizer)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
            if hvd.rank() == 0:
                tqdm.write(f"step {number + 1:>4}  loss {losses[-1]:.4f}")
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=int, default=-1, help="pipelines (default: as many as fit)")
    parser.add_argument("--pipeline", type=int, default=1, help="ranks that share the layers")
    parser.add_argument("--schedule", default="1f1b", help="gpipe, 1f1b, interleaved or zb-h1")
    parser.add_argument("--chunks", type=int, default=1, help="stages a rank, for interleaved")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, help="stop after so many")
    args = parser.parse_args()

    hvd.init()
    mesh = hvd.Mesh(data=args.data, pipeline=args.pipeline)
    if GLOBAL_BATCH % mesh.size_of("data"):
        raise SystemExit(f"{mesh.size_of('data')} pipelines cannot share a batch of {GLOBAL_BATCH}")
    images, labels, test_images, test_labels = load_data()
    model = hvd.PipelineModel(
        layers_of_the_model(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        mesh=mesh,
        schedule=args.schedule,
        chunks=args.chunks,
        microbatches=args.microbatches,
    )
    if hvd.rank() == 0:
        print(f"{mesh}\n{model.partition}")
    optimizer = keras.optimizers.Adam(2e-3)
    train(model, optimizer, images, labels, epochs=args.epochs, steps=args.steps)
    accuracy = (model.predict(test_images).argmax(1) == test_labels).mean()

    weights = {name: np.asarray(v) for name, v in model.named_variables().items()}
    mine = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in weights.items()}
    everyone = hvd.allgather_object(mine)
    hashes = {name: value for theirs in everyone for name, value in theirs.items()}
    identical = all(hashes[name] == value for theirs in everyone for name, value in theirs.items())
    if hvd.rank() == 0:
        digest = hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode())
        replicas = mesh.size_of("data")
        verdict = "identical" if identical else "DIFFERENT"
        print(
            f"test accuracy {accuracy:.2%}; {replicas} replica{'s' * (replicas > 1)} of each of "
            f"{len(hashes)} variables: {verdict}, sha256 {digest.hexdigest()[:16]}"
        )
    if not identical:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
