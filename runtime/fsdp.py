"""FSDP2: weights, gradients and moments are sharded. Each rank holds some of the rows of every matrix.

    train   `shard_model`: each block gathers its weights before it multiplies, and frees them afterwards
    save    checkpoint_writer.HostCopy gathers one tensor at a time, and rank 0 writes the same file as without FSDP
    load    `shard_like`: each rank maps this file, and copies its rows of one tensor after the other

So any number of ranks can resume from a checkpoint, with or without FSDP.
"""

import torch

import sparse24
from runtime.ranks import Ranks
from sparse24 import sparse_linears


def shard_model(model: torch.nn.Module, blocks, ranks: Ranks, device, copies: int, dtype, compile_mode) -> None:
    """Shard the model in place, over world_size / copies ranks: each of `blocks` by itself, then the other weights.

    dtype: of the gathered weights in blocks on a GPU. Models with soft thresholds gather float32. So do CPUs, where
    autocast does not support LayerNorm with 16-bit weights.
    copies: number of replicas of the model. compile_mode: torch.compile's mode for the blocks; None = eager.
    Raises ValueError if the ranks do not divide into `copies` replicas, or if a 4x4 block would lie on two ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if dtype == torch.float16:
        raise ValueError("parallel='fsdp' needs bfloat16 or float32; use --dtype=float32, or parallel='ddp'")
    if copies < 1 or ranks.world_size % copies:
        raise ValueError(f"fsdp_copies={copies}, need a divisor of the number of ranks, {ranks.world_size}")
    pieces, layers = ranks.world_size // copies, list(sparse_linears(model))
    for layer in layers:
        if not sparse24.fits(layer.out_features, pieces):
            divisors = [n for n in range(1, ranks.world_size + 1) if ranks.world_size % n == 0]
            fitting = [n for n in divisors if all(sparse24.fits(m.out_features, n) for m in layers)]
            raise ValueError(
                f"parallel='fsdp': {layer.out_features} rows of a sparse layer cannot be sharded over {pieces} ranks "
                f"by fours; set fsdp_copies to one of {', '.join(str(ranks.world_size // n) for n in fitting)}"
            )
    shape, names = ((pieces,), ("shard",)) if copies == 1 else ((copies, pieces), ("copy", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy, soft = {}, any(layer.recipe.mask == "soft" for layer in layers)
    if dtype != torch.float32 and device.type == "cuda" and not soft:  # a soft threshold needs the float32 weight
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = {"mp_policy": mixed}
    if compile_mode:
        compile_blocks(blocks, compile_mode)
    for block in blocks:
        fully_shard(block, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh)
    for layer in layers:
        layer.prune_again = True


def compile_blocks(blocks, mode: str) -> None:
    """Compile each block for itself, in place, so that equal blocks share their code."""
    # All blocks share the limit, and recompile for each phase, mode and batch size.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.compile(mode=mode)


def shard_like(full: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A copy of the unsharded tensor `full` on target's device, sharded if target is. It keeps the dtype of `full`.

    This rank reads and copies only its rows, without communication. Raises ValueError if the shapes differ.
    """
    if full.shape != target.shape:
        raise ValueError(f"shard_like: full has shape {tuple(full.shape)}, need the target's, {tuple(target.shape)}")
    rows = sparse24.rows_of(target, full)
    return sparse24.by_rows(lambda part: rows.to(part.device, copy=True), target, 1)
