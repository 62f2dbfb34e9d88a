"""Settings of the whole test run."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are tiny and processes run side by side; also for what tests start
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic runs; CUDA reads it once, at the start

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels then run on the CPU, in numpy
