"""Train a small ResNet on random images and count them: a script for Horovod, but for the import.

    mpirun -n 2 python examples/horovod_synthetic_benchmark.py [--batch-size 32] [--fp16-allreduce]

The last line says whether all ranks hold identical parameters after all those steps.
"""

import argparse
import hashlib
import timeit

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn, optim
from tqdm import tqdm

import hvdkit.torch as hvd

parser = argparse.ArgumentParser(
    description="Synthetic benchmark with Horovod's API",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--batch-size", type=int, default=32, help="batch of one rank")
parser.add_argument("--image-size", type=int, default=32, help="pixels of an image's edge")
parser.add_argument("--width", type=int, default=16, help="channels of the first layers")
parser.add_argument("--num-warmup-batches", type=int, default=5, help="batches before the clock")
parser.add_argument("--num-batches-per-iter", type=int, default=5, help="batches of an iteration")
parser.add_argument("--num-iters", type=int, default=10, help="iterations")
parser.add_argument("--no-cuda", action="store_true", help="do not use a GPU")
parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
parser.add_argument("--fp16-allreduce", action="store_true", help="send gradients as float16")
parser.add_argument("--use-adasum", action="store_true", help="combine ranks by Adasum")


class Block(nn.Module):
    """Two convolutions, and a way around them."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.around = nn.Identity()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.around = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.around(x))


def resnet(width, classes=1000):
    """Return a ResNet-10: four stages of one block each."""
    widths = [width, 2 * width, 4 * width, 8 * width]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *(
            Block(before, after, stride=1 if before == after else 2)
            for before, after in zip([width, *widths], widths, strict=False)
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], classes),
    )


def log(text):
    # Horovod: print on the first rank only.
    if hvd.rank() == 0:
        tqdm.write(text)


def parameters_hash(model):
    # Running means of batch norm are each rank's own, as in every data-parallel training.
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def main(args):
    hvd.init()
    device, kind = torch.device("cpu"), "CPU"
    if torch.cuda.is_available() and not args.no_cuda:
        # Horovod: pin GPU to local rank.
        device = torch.device("cuda", hvd.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        kind = "GPU"
    else:
        # Horovod: limit the number of CPU threads of a rank.
        torch.set_num_threads(1)

    model = resnet(args.width).to(device)

    # Horovod: scale the learning rate by the number of ranks, which Adasum does not need.
    lr_scaler = 1 if args.use_adasum else hvd.size()
    optimizer = optim.SGD(model.parameters(), lr=0.01 * lr_scaler)

    # Horovod: (optional) compression algorithm.
    compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none

    # Horovod: wrap optimizer with DistributedOptimizer.
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression,
        op=hvd.Adasum if args.use_adasum else hvd.Average,
    )

    # Horovod: broadcast parameters & optimizer state.
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    # Fixed fake data, different on every rank.
    data = torch.randn(args.batch_size, 3, args.image_size, args.image_size).to(device)
    target = torch.randint(1000, (args.batch_size,)).to(device)

    def benchmark_step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), target)
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    count = sum(parameter.numel() for parameter in model.parameters())
    log(f"Model: ResNet-10 of {count / 1e6:.2f} million parameters")
    log(f"Batch size: {args.batch_size}")
    log(f"Number of {kind}s: {hvd.size()}")

    log("Running warmup...")
    timeit.timeit(benchmark_step, number=args.num_warmup_batches)

    log("Running benchmark...")
    img_secs = []
    hidden = hvd.rank() != 0 or args.no_progress
    for number in tqdm(range(args.num_iters), unit="iter", disable=hidden):
        seconds = timeit.timeit(benchmark_step, number=args.num_batches_per_iter)
        img_sec = args.batch_size * args.num_batches_per_iter / seconds
        log(f"Iter #{number}: {img_sec:.1f} img/sec per {kind}")
        img_secs.append(img_sec)

    mean, conf = np.mean(img_secs), 1.96 * np.std(img_secs)
    log(f"Img/sec per {kind}: {mean:.1f} +-{conf:.1f}")
    ranks = hvd.size()
    log(f"Total img/sec on {ranks} {kind}(s): {ranks * mean:.1f} +-{ranks * conf:.1f}")

    hashes = hvd.allgather_object(parameters_hash(model))
    identical = len(set(hashes)) == 1
    verdict = "hold identical parameters" if identical else "DIFFER in their parameters"
    log(f"all {ranks} ranks {verdict}: sha256 {hashes[0]}")
    return 0 if identical else 1


if __name__ == "__main__":
    raise SystemExit(main(parser.parse_args()))
