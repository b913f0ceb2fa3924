"""One thread per process: the tests' networks are small, and two processes that share cores by spinning crawl."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
