"""Train where ranks have different amounts of data: a script for Horovod, but for the import.

    mpirun -n 3 python examples/horovod_uneven_join.py [--epochs 6]

Rank r has r + 1 shares of the digits, so the ranks run out of batches at different times.  One that
has calls ``join()``: it takes part in the others' all-reduces, adding nothing, until all are done.
"""

import argparse
import hashlib

import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.datasets import load_digits
from torch import nn, optim
from tqdm import tqdm

import hvdkit.torch as hvd

parser = argparse.ArgumentParser(
    description="Ranks with different amounts of data, trained with Horovod's API",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--batch-size", type=int, default=16, help="batch of one rank")
parser.add_argument("--epochs", type=int, default=6, help="epochs to train")
parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
parser.add_argument("--seed", type=int, default=42, help="random seed")


def load_data():
    """Return the training and the test set, each as images and labels."""
    digits = load_digits()
    images = torch.from_numpy(digits.data).float().div(8).sub(0.6)
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [(images[part], labels[part]) for part in (order[:1440], order[1440:])]


def uneven_share(images, labels):
    """Return this rank's examples: r + 1 shares on rank r, one after the other."""
    shares = hvd.size() * (hvd.size() + 1) // 2
    before = hvd.rank() * (hvd.rank() + 1) // 2
    begin = before * len(images) // shares
    end = (before + hvd.rank() + 1) * len(images) // shares
    return torch.utils.data.TensorDataset(images[begin:end], labels[begin:end])


def weights_hash(model):
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def main(args):
    # Horovod: initialize library.
    hvd.init()
    torch.manual_seed(args.seed + hvd.rank())
    # Horovod: limit the number of CPU threads of a rank.
    torch.set_num_threads(1)

    train_data, (test_images, test_labels) = load_data()
    dataset = uneven_share(*train_data)
    loader = torch.utils.data.DataLoader(dataset, batch_size=args.batch_size, shuffle=True)
    # Horovod: the ranks' numbers of batches.
    counts = hvd.allgather(torch.tensor([len(loader)]), name="batches").tolist()
    if hvd.rank() == 0:
        print(f"batches an epoch on each rank: {counts}", flush=True)

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    for epoch in range(1, args.epochs + 1):
        # Horovod: rank 0 runs out first, and waits at 100 % until the others have.
        with tqdm(loader, desc=f"Epoch {epoch}", unit="batch", disable=hvd.rank() != 0) as batches:
            for data, target in batches:
                optimizer.zero_grad()
                F.cross_entropy(model(data), target).backward()
                optimizer.step()
        # Horovod: no more data here; returns when that is so on every rank.
        last = hvd.join()
        # Horovod: ranks that joined early have missed steps; the last one has made them all.
        hvd.broadcast_parameters(model.state_dict(), root_rank=last)
        hvd.broadcast_optimizer_state(optimizer, root_rank=last)
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
        if hvd.rank() == 0:
            tqdm.write(f"rank {last} joined last; accuracy {accuracy:.2%}")

    hashes = hvd.allgather_object(weights_hash(model))
    identical = len(set(hashes)) == 1
    if hvd.rank() == 0:
        verdict = "hold identical weights" if identical else "DIFFER in their weights"
        print(
            f"accuracy {accuracy:.2%}; all {hvd.size()} ranks {verdict}: sha256 {hashes[0]}",
            flush=True,
        )
    return 0 if identical else 1


if __name__ == "__main__":
    raise SystemExit(main(parser.parse_args()))
