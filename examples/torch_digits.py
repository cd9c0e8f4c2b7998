"""Train a small CNN on handwritten digits, on any number of ranks, and show that it is right.

    mpirun -n 2 python examples/torch_digits.py [--epochs 12]

Every rank takes its share of each batch.  At the end: the test accuracy, whether all ranks hold
bitwise identical weights, and the same training by one process with the whole batches, loss for
loss and second for second.  The data ships inside scikit-learn.
"""

import argparse
import hashlib
import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from tqdm import tqdm

import hvdkit.torch as hvd

GLOBAL_BATCH = 60  # can be shared equally by 1 to 6 ranks


def load_data():
    """Return training and test images, float32 (n, 1, 8, 8), and labels."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(8).sub(0.6).unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(7))
    train, test = order[:1440], order[1440:]
    return images[train], labels[train], images[test], labels[test]


def build_model():
    """Return a small CNN without kinks.

    With ReLU and max-pooling, a difference in the last bit of a sum soon flips a unit on or off,
    and two equally good trainings part ways.  A smooth model keeps their losses comparable.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.GELU(),
        nn.Linear(128, 10),
    )


def build_optimizer(model, lr):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)


def train(model, optimizer, images, labels, *, rank, size, epochs, title):
    """Train on this rank's share of every batch; return its losses, one a step, and the seconds."""
    losses = []
    steps = len(images) // GLOBAL_BATCH
    began = time.perf_counter()
    bar = tqdm(total=epochs * steps, desc=title, unit="step", disable=rank != 0)
    for epoch in range(epochs):
        shuffle = torch.Generator().manual_seed(epoch)  # the same on every rank
        order = torch.randperm(len(images), generator=shuffle)
        for step in range(steps):
            batch = order[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
            share = batch[rank::size]
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[share]), labels[share])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.update()
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    bar.close()
    return np.array(losses), time.perf_counter() - began


def accuracy(model, images, labels):
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def weights_hash(model):
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def compare(distributed, single, seconds, seconds_alone):
    """Print both trainings side by side."""
    size = hvd.size()
    print(f"\n      step   loss on {size} ranks   loss on 1 rank   difference")
    for step in sorted({0, 1, 2, *np.linspace(3, len(single) - 1, 6).astype(int)}):
        ours, theirs = distributed[step], single[step]
        print(f"{step + 1:>10}   {ours:>15.6f}   {theirs:>14.6f}   {abs(ours - theirs):>10.1e}")
    worst = np.abs(distributed - single).max()
    print(f"largest difference of any of {len(single)} steps: {worst:.1e}")
    print(
        f"time: {seconds:.2f} s on {size} ranks, {seconds_alone:.2f} s on one: "
        f"{seconds_alone / seconds:.2f} times as fast (each rank on one core)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=0.05)
    args = parser.parse_args()

    hvd.init()
    if GLOBAL_BATCH % hvd.size():
        raise SystemExit(f"a batch of {GLOBAL_BATCH} cannot be shared by {hvd.size()} ranks")
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = load_data()
    run = {"images": images, "labels": labels, "epochs": args.epochs}

    torch.manual_seed(hvd.rank())  # different weights on every rank, until they are broadcast
    model = build_model()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        build_optimizer(model, args.lr),
        named_parameters=model.named_parameters(),
    )
    local, seconds = train(
        model, optimizer, rank=hvd.rank(), size=hvd.size(), title=f"{hvd.size()} ranks", **run
    )
    losses = hvd.allreduce(torch.from_numpy(local), name="losses").numpy()
    correct = accuracy(model, test_images, test_labels)
    digest = weights_hash(model)
    digests = hvd.allgather(torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8))
    identical = bool((digests.view(hvd.size(), -1) == digests[:32]).all())

    if hvd.rank() == 0:
        torch.manual_seed(0)  # rank 0's weights again
        alone = build_model()
        single, seconds_alone = train(
            alone, build_optimizer(alone, args.lr), rank=0, size=1, title="1 rank", **run
        )
        compare(losses, single, seconds, seconds_alone)
        correct_alone = accuracy(alone, test_images, test_labels)
        print(f"test accuracy: {correct:.2%}, on one rank {correct_alone:.2%}")
        verdict = "hold bitwise identical weights" if identical else "DIFFER in their weights"
        print(f"all {hvd.size()} ranks {verdict}: sha256 {digest[:16]}")
    hvd.barrier()
    if not identical:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
