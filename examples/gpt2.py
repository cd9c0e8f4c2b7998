"""Train a GPT-2 on Python's own source: layers over a pipeline of ranks, batches over replicas.

    mpirun -n 4 python examples/gpt2.py --data 2 --pipeline 2 [--layers 12 --width 768 --heads 12]

The text is the standard library's modules, byte by byte.  A batch, and the weights to begin with,
are the same whatever the mesh: so are the losses, to rounding.  At the end: perplexity, a sample of
what was learnt, what each rank had, and whether all copies of the weights are alike, bit by bit.
"""

import argparse
import hashlib
import math
import sysconfig
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

import hvdkit
import hvdkit.torch as hvd

VOCABULARY = 256  # of bytes

parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
group = parser.add_argument_group("ranks: data * pipeline of them")
group.add_argument("--data", type=int, default=1, help="replicas of the pipeline")
group.add_argument("--pipeline", type=int, default=-1, help="ranks that share the layers; -1: all")
group.add_argument("--schedule", default="1f1b", help="gpipe, 1f1b, interleaved or zb-h1")
group.add_argument("--microbatches", type=int, default=4, help="in a batch of one replica")
group.add_argument("--chunks", type=int, default=1, help="stages of a rank; for interleaved")
group.add_argument("--recompute", action="store_true", help="activations again in backward")
group = parser.add_argument_group("model")
group.add_argument("--layers", type=int, default=6, help="transformer blocks")
group.add_argument("--width", type=int, default=192, help="of the residual stream")
group.add_argument("--heads", type=int, default=6, help="of attention, in a block")
group.add_argument("--context", type=int, default=128, help="bytes that the model sees")
group.add_argument("--dropout", type=float, default=0.0)
group = parser.add_argument_group("training")
group.add_argument("--batch", type=int, default=16, help="windows in a batch, all replicas'")
group.add_argument("--lr", type=float, default=1e-3, help="peak of the learning rate")
group.add_argument("--warmup-steps", type=int, default=20, help="until the peak")
group.add_argument("--decay-steps", type=int, default=600, help="until a tenth of it, and the end")
group.add_argument("--steps", type=int, default=math.inf, help="stop early, after as many")
group.add_argument("--weight-decay", type=float, default=0.1, help="of matrices")
group.add_argument("--max-norm", type=float, default=1.0, help="largest norm of the gradients")
group.add_argument("--seed", type=int, default=0)
group = parser.add_argument_group("evaluation")
group.add_argument("--validate-every", type=int, default=50, help="steps")
group.add_argument("--validation-batches", type=int, default=4)
group.add_argument("--checkpoint", metavar="DIR", help="where to keep the best, by validation")
group.add_argument("--resume", metavar="DIR", help="where to go on from, whatever mesh it was")
group.add_argument("--sample", type=int, default=200, help="bytes to generate at the end")


class Embedding(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, args.width)
        self.positions = nn.Embedding(args.context, args.width)
        self.dropout = nn.Dropout(args.dropout)
        initialise(self, args)

    def forward(self, tokens):
        return self.dropout(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.heads, self.dropout = args.heads, args.dropout
        self.queries_keys_values = nn.Linear(args.width, 3 * args.width)
        self.projection = nn.Linear(args.width, args.width)

    def forward(self, x):
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (rows, heads, context, width)
            for part in self.queries_keys_values(x).chunk(3, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.projection(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        width = args.width
        self.norm_1, self.attention = nn.LayerNorm(width), Attention(args)
        self.norm_2, self.hidden = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.projection = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(args.dropout)
        initialise(self, args)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm_1(x)))
        hidden = functional.gelu(self.hidden(self.norm_2(x)), approximate="tanh")
        return x + self.dropout(self.projection(hidden))


class Head(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.norm = nn.LayerNorm(args.width)
        self.tokens = nn.Linear(args.width, VOCABULARY, bias=False)
        initialise(self, args)

    def forward(self, x):
        return self.tokens(self.norm(x))


def initialise(layer, args):
    """Draw weights as GPT-2 does: smaller where 2 projections a block add to the same stream."""
    for name, parameter in layer.named_parameters():
        if parameter.dim() >= 2:
            fan = 2 * args.layers if "projection" in name else 1
            nn.init.normal_(parameter, std=0.02 / math.sqrt(fan))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def tied_weights(args):
    """Return the names of what is one matrix: a byte's embedding, and what scores it as output."""
    return "layers.0.tokens.weight", f"layers.{args.layers + 1}.tokens.weight"


def build_model(args, mesh):
    kinds = [Embedding, *[Block] * args.layers, Head]
    return hvd.PipelineModule(
        [partial(kind, args) for kind in kinds],  # a rank makes its own layers, not the others
        lambda logits, target: functional.cross_entropy(logits.flatten(0, 1), target.flatten()),
        mesh=mesh,
        schedule=args.schedule,
        microbatches=args.microbatches,
        chunks=args.chunks,
        recompute=args.recompute,
        tied=[tied_weights(args)],
        seed=args.seed,
    )


def build_optimizer(model, args):
    parameters = list(model.parameters())  # of this rank's layers
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))


def learning_rate(step, args):
    """Return a step's learning rate: it rises in a line, and falls as a cosine."""
    if step < args.warmup_steps:
        return args.lr * step / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.decay_steps - args.warmup_steps)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


def load_text():
    """Return the text to train on and the text to validate with, uint8."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray().join(map(Path.read_bytes, modules)), dtype=torch.uint8)
    return text.tensor_split([len(text) * 19 // 20])


def windows(text, starts, args, mesh):
    """Return inputs and targets, int64 (share, context): this replica's share of those `starts`."""
    mine = starts.tensor_split(mesh.shape["data"])[mesh.coordinates["data"]]
    seen = text[mine[:, None] + torch.arange(args.context + 1)].long()
    return seen[:, :-1], seen[:, 1:]


def training_batch(text, step, args, mesh):
    """Return a step's batch, the same windows on any mesh and after any resume."""
    draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - args.context, (args.batch,), generator=draw)
    return windows(text, starts, args, mesh)


def validate(model, text, args, mesh):
    """Return the loss of windows that are spread over a text."""
    count = args.validation_batches * args.batch
    starts = torch.arange(count) * (len(text) - args.context) // count
    batches = [windows(text, some, args, mesh) for some in starts.split(args.batch)]
    return sum(model.evaluate(*batch).item() for batch in batches) / len(batches)


def train(model, optimizer, best, args, mesh):
    """Train from the best step so far; return the last validation loss, and the best."""
    text, held_out = load_text()
    first, last = best["step"] + 1, min(args.steps, args.decay_steps)
    tokens, loss_now = args.batch * args.context, best["loss"]
    done = {"total": last * tokens, "initial": best["step"] * tokens}
    with tqdm(**done, unit="tok", unit_scale=True, disable=hvd.rank() != 0) as bar:
        for step in range(first, last + 1):
            rate = learning_rate(step, args)
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate
            optimizer.zero_grad()
            loss = model(*training_batch(text, step, args, mesh))  # forward and backward
            norm = model.clip_grad_norm_(args.max_norm)
            optimizer.step()
            bar.update(tokens)
            say(f"step {step}  loss {loss:.4f}  lr {rate:.5f}  norm {norm:.2f}")
            if step % args.validate_every == 0 or step == last:
                loss_now = validate(model, held_out, args, mesh)
                say(f"step {step}  validation perplexity {math.exp(loss_now):.3f}")
                if loss_now < best["loss"]:
                    best = {"step": step, "loss": loss_now}
                    if args.checkpoint:
                        model.save(args.checkpoint, optimizer, metadata=best)
    return loss_now, best


def sample(model, args):
    """Return text as the model would write it."""
    dice = torch.Generator().manual_seed(args.seed)  # the same on every rank

    def choose(logits):
        likely = (logits / 0.8).softmax(-1)
        return torch.multinomial(likely, 1, generator=dice).squeeze(1)

    prompt = torch.tensor([list(b"def ")])
    found = model.generate(prompt, args.sample, window=args.context, choose=choose)
    return bytes(found[0].tolist()).decode(errors="replace")


def verdict(model, args):
    """Return whether ranks that hold the same weights hold the same bits, and a line about it."""
    mine = {
        name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }
    copies, (first, second) = defaultdict(list), tied_weights(args)
    for of_a_rank in hvd.allgather_object(mine):
        for name, digest in of_a_rank.items():
            copies[first if name == second else name].append(digest)
    identical = all(len(set(digests)) == 1 for digests in copies.values())
    count = sum(map(len, copies.values()))
    return identical, (
        f"{len(copies)} weights on {hvd.size()} ranks, {count} with their copies, which "
        f"{'hold identical bits' if identical else 'DIFFER'}"
    )


def say(line):
    if hvd.rank() == 0:
        tqdm.write(line)


def build(args):
    """Return mesh, model and optimizer, and the best step so far with its validation loss."""
    mesh = hvdkit.Mesh(data=args.data, pipeline=args.pipeline)
    if args.batch % mesh.shape["data"]:
        raise hvdkit.ArgumentError(f"a batch of {args.batch} cannot be shared equally in {mesh}")
    if args.width % args.heads:
        raise hvdkit.ArgumentError(f"{args.heads} heads cannot share a width of {args.width}")
    model = build_model(args, mesh)
    optimizer = build_optimizer(model, args)
    if not args.resume:
        return mesh, model, optimizer, {"step": 0, "loss": math.inf}
    best = model.load(args.resume, optimizer)
    say(f"resumed after step {best['step']}, validation loss {best['loss']:.4f}")
    return mesh, model, optimizer, best


def main(args):
    hvd.init()
    torch.set_num_threads(1)  # it is ranks that fill the cores
    torch.manual_seed(args.seed + hvd.rank())  # for dropout alone
    try:
        mesh, model, optimizer, best = build(args)
    except (hvdkit.ArgumentError, hvdkit.CheckpointError) as error:  # the same on every rank
        return str(error) if hvd.rank() == 0 else 0
    loss, best = train(model, optimizer, best, args, mesh)
    say(
        f"\nvalidation perplexity {math.exp(loss):.3f}; "
        f"the best, after step {best['step']}: {math.exp(best['loss']):.3f}"
    )
    text = sample(model, args)
    say(f"\n{text}\n\n{mesh}, {args.schedule}\n{model.partition}")
    identical, line = verdict(model, args)
    say(line)
    return 0 if identical else 1


if __name__ == "__main__":
    raise SystemExit(main(parser.parse_args()))
