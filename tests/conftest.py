"""Settings of the whole test run: one thread, since the tensors are tiny and processes run side by side."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start

import torch

torch.set_num_threads(1)
