"""Train a CNN on handwritten digits: a script for Horovod, but for one line, the import.

    mpirun -n 2 python examples/horovod_mnist.py [--epochs 8] [--use-adasum] [--fp16-allreduce]

The 1797 digits ship inside scikit-learn.  The last line says how many of the test digits were
recognised, and whether all ranks hold identical weights.
"""

import argparse
import hashlib

import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils.data.distributed
from sklearn.datasets import load_digits
from torch import nn, optim
from tqdm import tqdm

import hvdkit.torch as hvd

parser = argparse.ArgumentParser(
    description="Digits, trained with Horovod's API",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--batch-size", type=int, default=32, help="training batch of one rank")
parser.add_argument("--test-batch-size", type=int, default=200, help="test batch of one rank")
parser.add_argument("--epochs", type=int, default=8, help="epochs to train")
parser.add_argument("--lr", type=float, default=0.02, help="learning rate of one rank")
parser.add_argument("--momentum", type=float, default=0.9, help="SGD momentum")
parser.add_argument("--seed", type=int, default=42, help="random seed")
parser.add_argument("--no-cuda", action="store_true", help="do not use a GPU")
parser.add_argument("--fp16-allreduce", action="store_true", help="send gradients as float16")
parser.add_argument("--use-adasum", action="store_true", help="combine ranks by Adasum")
parser.add_argument(
    "--gradient-predivide-factor",
    type=float,
    default=1.0,
    help="divide gradients by this before they are summed, and by the rest after",
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.conv2_drop = nn.Dropout2d(0.1)
        self.fc1 = nn.Linear(512, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)


def load_data():
    """Return the training and the test set."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(8).sub(0.6).unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order[:1440], order[1440:]
    return [torch.utils.data.TensorDataset(images[part], labels[part]) for part in parts]


def train(epoch, model, optimizer, loader, device):
    model.train()
    # Horovod: shuffle differently in each epoch, and alike on all ranks.
    loader.sampler.set_epoch(epoch)
    # Horovod: show progress on the first rank only.
    with tqdm(loader, desc=f"Epoch {epoch}", unit="batch", disable=hvd.rank() != 0) as batches:
        for data, target in batches:
            optimizer.zero_grad()
            loss = F.nll_loss(model(data.to(device)), target.to(device))
            loss.backward()
            optimizer.step()
            batches.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def metric_average(value, name):
    return hvd.allreduce(torch.tensor(value), name=name).item()


def test(model, loader, device):
    """Return loss and accuracy on the test set, all ranks' parts of it together."""
    model.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for data, target in loader:
            output = model(data.to(device)).cpu()
            loss += F.nll_loss(output, target, reduction="sum").item()
            correct += (output.argmax(1) == target).sum().item()
    # Horovod: the sampler knows how many examples are this rank's.
    loss, accuracy = loss / len(loader.sampler), correct / len(loader.sampler)
    return metric_average(loss, "avg_loss"), metric_average(accuracy, "avg_accuracy")


def weights_hash(model):
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def main(args):
    # Horovod: initialize library.
    hvd.init()
    torch.manual_seed(args.seed + hvd.rank())
    # Horovod: limit the number of CPU threads of a rank.
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.cuda.is_available() and not args.no_cuda:
        # Horovod: pin GPU to local rank.
        device = torch.device("cuda", hvd.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)

    loaders = []
    for dataset, size in zip(load_data(), (args.batch_size, args.test_batch_size), strict=True):
        # Horovod: partition the data by DistributedSampler.
        sampler = torch.utils.data.distributed.DistributedSampler(
            dataset, num_replicas=hvd.size(), rank=hvd.rank()
        )
        loaders.append(torch.utils.data.DataLoader(dataset, batch_size=size, sampler=sampler))
    train_loader, test_loader = loaders

    model = Net().to(device)
    # Horovod: scale the learning rate by the number of ranks, which Adasum does not need.
    lr_scaler = 1 if args.use_adasum else hvd.size()
    optimizer = optim.SGD(model.parameters(), lr=args.lr * lr_scaler, momentum=args.momentum)

    # Horovod: broadcast parameters & optimizer state.
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    # Horovod: (optional) compression algorithm.
    compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none

    # Horovod: wrap optimizer with DistributedOptimizer.
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression,
        op=hvd.Adasum if args.use_adasum else hvd.Average,
        gradient_predivide_factor=args.gradient_predivide_factor,
    )

    for epoch in range(1, args.epochs + 1):
        train(epoch, model, optimizer, train_loader, device)
        loss, accuracy = test(model, test_loader, device)
        if hvd.rank() == 0:
            tqdm.write(f"Test set: average loss {loss:.4f}, accuracy {accuracy:.2%}")

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
