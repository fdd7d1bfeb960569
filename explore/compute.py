"""The script of the workers that compute features. It is a run whose rounds are images, with nothing to train."""

from __future__ import annotations

import sys

import msgspec
import torch
from torch import nn

import roundtable
from roundtable.explore.features import AllImages, Job
from roundtable.explore.layers import features_of
from roundtable.explore.trained import open_run, weights_at


def main() -> None:
    """Compute this worker's micro-batches. If two workers write a row, both write the same."""
    run = roundtable.join()
    job = msgspec.json.decode(sys.argv[1], type=Job)
    trained = open_run(job.source)
    model = weights_at(trained, "last").to(run.device)
    features, labels = job.features(), job.labels()
    #: A contribution is a gradient, so the model needs a weight. It never changes. Its gradient says that a micro-batch is done.
    done = run.replicate(nn.Linear(1, 1, bias=False))
    opt = run.optimizer(torch.optim.SGD, lr=1.0)
    for images, labels_of, rows in run.batches(AllImages(trained.images.train, trained.images.test), shuffle=False):
        features[rows] = features_of(model, job.layer, images.to(run.device))
        labels[rows] = labels_of
        (0 * done.weight.sum()).backward()
        opt.step()


if __name__ == "__main__":
    main()
