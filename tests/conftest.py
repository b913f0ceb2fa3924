"""One thread per process: the tests' networks are small, and two processes that share cores by spinning crawl."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from mf_lightning.callbacks import preemption

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background: commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals_given_back():
    """A command listens for SIGTERM until its process ends; the tests' process goes on."""
    yield
    preemption._listener._for_good = False
    preemption._listener.stop()
    preemption._listener.received = 0
