"""Trainers side by side: this project, PyTorch's own ways of training data-parallel, and no communication at all.

`python -m benchmarks --help` says how to run them; nothing else of the project imports this package.
"""
