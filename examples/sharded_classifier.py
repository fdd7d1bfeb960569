"""A classifier over many classes, such as the identities of face recognition, whose last layer is spread over the servers.

No process holds the layer whole: servers keep its rows and compute with them. With --classes 10000000 it has 5 GB. The data are
made up: each class has a centre, and its samples are noisy pictures of that.
"""

import argparse
import resource
import time

import torch
from torch import nn
from torch.utils.data import Dataset

import roundtable

INPUTS = 32

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--classes", type=int, default=5_000, help="how many there are")
parser.add_argument("--features", type=int, default=128, help="numbers that a sample, and a row of the last layer, has")
parser.add_argument("--samples", type=int, default=20_000, help="of the first classes, as many as there are 10 samples of")
parser.add_argument("--held-out", type=int, default=512, help="samples that it is judged by at the end")
parser.add_argument("--epochs", type=int, default=2, help="passes over them")
parser.add_argument("--micro-batch", type=int, default=64)
parser.add_argument("--global-batch", type=int, default=256)
parser.add_argument("--lr", type=float, default=0.2, help="learning rate")
parser.add_argument("--momentum", type=float, default=0.9, help="above 0 servers keep twice as many numbers")
parser.add_argument("--sample-rate", type=float, default=1.0, help="share of the classes that each round looks at")
parser.add_argument("--clip-norm", type=float, default=None, help="clip the whole gradient to this; costs a pass over the rows")
parser.add_argument("--margin", choices=["none", "cosface", "arcface"], default="cosface")
args = parser.parse_args()


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Samples (INPUTS) and their classes. The centre of class c is cos(c x frequencies + phases)."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        generator = torch.Generator().manual_seed(0)
        self.frequencies = torch.rand(INPUTS, generator=generator, dtype=torch.float64) * 100
        self.classes = min(args.classes, max(1, args.samples // 10))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        label = number % self.classes
        noise = torch.randn(INPUTS, generator=torch.Generator().manual_seed(self.seed + number))
        return torch.cos(label * self.frequencies).float() + 0.3 * noise, label


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(INPUTS, 256), nn.ReLU(), nn.Linear(256, args.features))
        self.head = roundtable.ShardedLinear(args.features, args.classes, sample_rate=args.sample_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.head(self.body(x))
        return features


run = roundtable.join()
model = run.replicate(Net())
opt = run.optimizer(torch.optim.SGD, lr=args.lr, momentum=args.momentum, clip_norm=args.clip_norm)
margin = {"none": None, "cosface": roundtable.CosFace(16.0, 0.2), "arcface": roundtable.ArcFace(16.0, 0.2)}[args.margin]
began = time.monotonic()
sizes = {"micro_batch": args.micro_batch, "global_batch": args.global_batch, "epochs": args.epochs}
for x, labels in run.batches(Pictures(args.samples, 1 << 32), **sizes):
    loss = roundtable.sharded_cross_entropy(model(x), labels, margin=margin)
    loss.backward()
    run.log(loss=loss)
    opt.step()
rounds = max(1, run.round)
seconds = (time.monotonic() - began) / rounds
megabytes = (run.traffic.pushed_bytes + run.traffic.pulled_bytes) / 1e6 / rounds

if run.is_chief:
    held_out = Pictures(args.held_out, 1)
    right = 0
    with torch.no_grad():
        for start in range(0, len(held_out), args.micro_batch):
            items = [held_out[n] for n in range(start, min(start + args.micro_batch, len(held_out)))]
            features = model.body(torch.stack([x for x, _ in items]))
            _, best = model.head.topk(features, 1, cosine=margin is not None)
            right += int((best[:, 0] == torch.tensor([label for _, label in items])).sum())
    run.log(accuracy=right / len(held_out), held_out=len(held_out))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    weights = 4 * args.classes * args.features / 2**20
    print(f"{right / len(held_out):.1%} of {len(held_out)} held-out samples are right;")
    print(f"a round took {seconds:.2f} s, and {megabytes:.2f} MB travelled;")
    print(f"the last layer has {weights:.0f} MiB, and this worker never took up more than {peak:.0f} MiB")
