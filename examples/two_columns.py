"""Train AlexNet in two columns on a folder of images: each worker has it on two devices, and the workers share the batch.

The folder has one folder of images for each class. `--side 64` is enough to try it without GPUs.
"""

import argparse

import torch

import roundtable
from roundtable.worker.data import load
from roundtable.worker.models.builtin import build

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="the images")
parser.add_argument("--model", default="alexnet-2012", help="the network: alexnet-2012 or alexnet-text")
parser.add_argument(
    "--devices", default="cuda:0,cuda:1" if torch.cuda.device_count() > 1 else "cpu,cpu", help="one for each column"
)
parser.add_argument("--side", type=int, default=224, help="height and width that images are stretched to")
parser.add_argument("--epochs", type=int, default=10, help="passes over them")
parser.add_argument("--lr", type=float, default=3e-4, help="learning rate")
args = parser.parse_args()

images = load("folder", args.folder, seed=0, shape=(3, args.side, args.side))

run = roundtable.join()
model = run.replicate(build(args.model, images.shape, images.classes, args.devices))
opt = run.optimizer(torch.optim.AdamW, lr=args.lr)
for x, y in run.batches(images.train, micro_batch=16, global_batch=64, epochs=args.epochs, num_workers=1):
    logits = model(x)  # on the first device, on whichever device x is
    loss = torch.nn.functional.cross_entropy(logits, y.to(logits.device))
    loss.backward()
    run.log(loss=loss)
    opt.step()

if run.is_chief:
    model.eval()
    with torch.no_grad():
        held_out = torch.utils.data.DataLoader(images.test, batch_size=50)
        right = sum(int((model(x).argmax(1).cpu() == y).sum()) for x, y in held_out)
    run.log(accuracy=right / len(images.test), held_out=len(images.test))
    print(f"held-out accuracy {right / len(images.test):.1%}")
