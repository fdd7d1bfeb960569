"""AlexNet on a folder of images as a hybrid: workers share the batch, and servers divide the fully connected layers.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014): nine tenths of the weights are in the fully
connected layers, and nine tenths of the arithmetic in the convolutions. So activities of the former travel, and gradients of the
latter. The folder has one folder of images for each class. `--side 64` is enough to try it without GPUs.
"""

import argparse

import torch

import roundtable
from roundtable.worker.data import load
from roundtable.worker.models.builtin import build
from roundtable.worker.models.hybrid import shard_fully_connected

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="the images")
parser.add_argument("--model", default="alexnet", help="a network that ends in fully connected layers")
parser.add_argument("--side", type=int, default=224, help="height and width that images are stretched to")
parser.add_argument("--epochs", type=int, default=10, help="passes over them")
parser.add_argument("--lr", type=float, default=3e-4, help="learning rate")
args = parser.parse_args()

images = load("folder", args.folder, seed=0, shape=(3, args.side, args.side))

run = roundtable.join()
model = build(args.model, images.shape, images.classes)
head = shard_fully_connected(model, images.classes)  # or write roundtable.ColumnParallelLinear and ShardedLinear into your own
run.replicate(model)
opt = run.optimizer(torch.optim.AdamW, lr=args.lr)
for x, y in run.batches(images.train, micro_batch=16, global_batch=64, epochs=args.epochs, num_workers=1):
    loss = roundtable.sharded_cross_entropy(model(x), y)
    loss.backward()
    run.log(loss=loss)
    opt.step()

if run.is_chief:
    model.eval()
    with torch.no_grad():
        held_out = torch.utils.data.DataLoader(images.test, batch_size=50)
        right = sum(int((head.topk(model(x), 1)[1][:, 0] == y).sum()) for x, y in held_out)
    run.log(accuracy=right / len(images.test), held_out=len(images.test))
    megabytes = (run.traffic.pushed_bytes + run.traffic.pulled_bytes) / 1e6 / run.round
    print(f"held-out accuracy {right / len(images.test):.1%}; {megabytes:.1f} MB a round to and from this worker")
