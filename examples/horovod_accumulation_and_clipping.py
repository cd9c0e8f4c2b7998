"""Train a language model on Python's own source: a script for Horovod, but for the import.

    mpirun -n 2 python examples/horovod_accumulation_and_clipping.py [--steps 150]

Gradients of several batches are accumulated before they travel, and clipped when they are averaged:
``backward_passes_per_step``, ``synchronize()`` and ``skip_synchronize()``.  The model reads
characters of the standard library's modules and guesses the next one.
"""

import argparse
import hashlib
import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils.data.distributed
from torch import nn, optim
from tqdm import tqdm

import hvdkit.torch as hvd

parser = argparse.ArgumentParser(
    description="A character-level language model, trained with Horovod's API",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--steps", type=int, default=150, help="optimizer steps")
parser.add_argument("--batch-size", type=int, default=16, help="windows in a batch of one rank")
parser.add_argument(
    "--batches-per-allreduce",
    type=int,
    default=2,
    help="batches whose gradients are accumulated on a rank before they travel",
)
parser.add_argument("--window", type=int, default=64, help="characters in a window")
parser.add_argument("--hidden", type=int, default=128, help="width of the GRU")
parser.add_argument("--characters", type=int, default=1_000_000, help="length of the text")
parser.add_argument("--lr", type=float, default=0.004, help="learning rate")
parser.add_argument("--max-norm", type=float, default=0.5, help="largest norm of the gradients")
parser.add_argument("--no-cuda", action="store_true", help="do not use a GPU")


class Model(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.gru = nn.GRU(32, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 128)

    def forward(self, x):
        return self.out(self.gru(self.embedding(x))[0])


def load_data(characters, window):
    """Return the text's windows, int64 (n, window + 1), to train with and to test with."""
    text = ""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= characters:
            break
    codes = bytearray(text[:characters].encode("ascii", "replace"))
    windows = torch.frombuffer(codes, dtype=torch.uint8).long().unfold(0, window + 1, window)
    held_out = max(1, len(windows) // 50)
    return windows[:-held_out], windows[-held_out:]


def batches(windows, batch_size):
    """Yield this rank's batches, without end."""
    # Horovod: partition the data by DistributedSampler.
    sampler = torch.utils.data.distributed.DistributedSampler(
        windows, num_replicas=hvd.size(), rank=hvd.rank()
    )
    loader = torch.utils.data.DataLoader(
        windows, batch_size=batch_size, sampler=sampler, drop_last=True
    )
    if len(loader) == 0:
        raise SystemExit("the text is too short for a batch on every rank")
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def loss_of(model, windows):
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def test(model, windows):
    """Return bits per character and the share of characters guessed right, of all ranks."""
    model.eval()
    mine = windows[hvd.rank() :: hvd.size()]
    with torch.no_grad():
        output, target = model(mine[:, :-1]), mine[:, 1:]
        loss = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")
        sums = torch.stack([loss, (output.argmax(2) == target).sum()]).double().cpu()
    # Horovod: add up metrics of all ranks.
    sums = hvd.allreduce(sums, name="test", op=hvd.Sum) / windows[:, 1:].numel()
    return sums[0].item() / math.log(2), sums[1].item()


def weights_hash(model):
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def main(args):
    # Horovod: initialize library.
    hvd.init()
    torch.manual_seed(hvd.rank())
    # Horovod: limit the number of CPU threads of a rank.
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.cuda.is_available() and not args.no_cuda:
        # Horovod: pin GPU to local rank.
        device = torch.device("cuda", hvd.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)

    train_windows, test_windows = load_data(args.characters, args.window)
    model = Model(args.hidden).to(device)
    optimizer = optim.Adam(model.parameters(), lr=args.lr)

    # Horovod: wrap optimizer with DistributedOptimizer.
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        backward_passes_per_step=args.batches_per_allreduce,
    )

    # Horovod: broadcast parameters & optimizer state.
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    data = batches(train_windows, args.batch_size)
    clipped = 0
    with tqdm(total=args.steps, unit="step", disable=hvd.rank() != 0) as bar:
        for _ in range(args.steps):
            optimizer.zero_grad()
            for _ in range(args.batches_per_allreduce):
                loss = loss_of(model, next(data).to(device)) / args.batches_per_allreduce
                loss.backward()
            # Horovod: wait for the averaged gradients, clip them, step without averaging again.
            optimizer.synchronize()
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_norm)
            with optimizer.skip_synchronize():
                optimizer.step()
            clipped += int(norm > args.max_norm)
            bar.set_postfix(norm=f"{norm:.2f}", refresh=False)
            bar.update()

    bits, accuracy = test(model, test_windows.to(device))
    hashes = hvd.allgather_object(weights_hash(model))
    identical = len(set(hashes)) == 1
    if hvd.rank() == 0:
        verdict = "hold identical weights" if identical else "DIFFER in their weights"
        print(f"gradients clipped in {clipped} of {args.steps} steps")
        print(
            f"{bits:.2f} bits a character, accuracy {accuracy:.2%}; "
            f"all {hvd.size()} ranks {verdict}: sha256 {hashes[0]}",
            flush=True,
        )
    return 0 if identical else 1


if __name__ == "__main__":
    raise SystemExit(main(parser.parse_args()))
