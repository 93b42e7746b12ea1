"""Every test starts with one torch thread and torch's own arithmetic, because models are tiny and rounding depends on both, and leaves Ctrl-C as it found it."""
import signal

import pytest
import torch

torch.set_num_threads(1)            # for what modules and their fixtures compute


@pytest.fixture(autouse=True)
def as_torch_starts():
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    handler = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is handler
