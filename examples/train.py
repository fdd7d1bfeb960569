"""A training script as you would write it. Run it alone, or hand it to the launcher to run it on a cluster, unchanged."""

import argparse
import math

import torch

import roundtable
from roundtable.worker.data import load

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", default="digits", help="the images to train on: digits or mnist-5k")
parser.add_argument("--epochs", type=int, default=8, help="passes over them")
parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
args = parser.parse_args()


class Net(torch.nn.Sequential):
    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(pixels, 256), torch.nn.ReLU(), torch.nn.Linear(256, classes))


images = load(args.data, data_dir=None, seed=0)  # any map-style torch data set will do

run = roundtable.join()
model = run.replicate(Net(math.prod(images.shape), images.classes))
opt = run.optimizer(torch.optim.AdamW, lr=args.lr)
for x, y in run.batches(images.train, micro_batch=16, global_batch=64, epochs=args.epochs):
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    run.log(loss=loss)
    opt.step()

if run.is_chief:
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in torch.utils.data.DataLoader(images.test, batch_size=250))
    run.log(accuracy=right / len(images.test), held_out=len(images.test))
    print(f"held-out accuracy {right / len(images.test):.1%}")
