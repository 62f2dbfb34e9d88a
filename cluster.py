"""A plan for a run on many GPUs: memory, step time, communication, refresh, checksum, checkpoint, by counting.

What one GPU computes is roofline.py's training step; what many have on top is counted here. Nothing here is measured.

    layouts   DDP: every GPU holds everything. FSDP2 within groups of `shards` GPUs, HSDP where there are several groups
              (a node of 8 each): masters, gradients and moments in shards; blocks are gathered in bf16 for the forward
              and again for the backward of every micro-step, packed then and freed after, gradients scattered in fp32.
              What is outside of blocks is gathered once, in fp32, since the residual stream begins with it.
    overlap   Gathers of the forward hide behind all of the forward, gathers and scatters of the backward behind all of
              the backward, two thirds of a micro-step. Gradients are reduced between replicas once, behind the last
              backward: beside its gathers and scatters where these stay within nodes and it does not (FSDP2 gives
              it a stream), else after them. What is longer is exposed. Communication slows no GEMM down.
    left out  launches and stragglers; what cannot overlap at either end of a pass; DDP's copies into its buckets;
              allocator, CUDA context and NCCL's buffers, for which FITS leaves room; activation checkpointing, tensor
              and pipeline parallelism; reading data; restarts.

Seconds and bytes throughout, gigabytes are 1e9; P = parameters, "sparse weights" are those of feed-forward layers.
"""

import math
from dataclasses import dataclass
from functools import partial

import roofline
from model import PRESETS, GPTConfig

NODE = 8  # GPUs
# GB/s per GPU and direction by NVIDIA's data sheets: NVLink (half of the advertised sum of both directions), and the
# node's network cards, one per GPU: DGX A100 8 x 200 Gb/s, DGX H100, H200 and B200 8 x 400 Gb/s (ConnectX-7).
WIRES = {"a100": (300, 25), "h100": (450, 50), "h200": (450, 50), "b200": (900, 50)}
# Of both; an assumption. NCCL's maintainers name 370 of 450 GB/s (nccl-tests #212) and 46 to 48 of 50 (#290).
WIRE_SHARE = 0.8
HOP, FAR_HOP = 3.4e-6, 9.6e-6  # seconds to a neighbour in the node and in another: NCCL's own model (graph/tuning.cc)
PCIE = {"a100": 25e9, "h100": 50e9, "h200": 50e9, "b200": 50e9}  # bytes/s to host memory, of 32 (gen4) or 64 (gen5)
MEMORY = {"a100": 80e9, "h100": 80e9, "h200": 141e9, "b200": 180e9}  # data sheets; B200 as in DGX B200
FITS = 0.9  # share of the memory that what is counted may fill
BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at once: PyTorch's default
BACKWARD = 2 / 3  # of a micro-step, as of its FLOPs
DISK = 2e9  # bytes/s that one node writes: an assumption
SAVE_EVERY = 300.0  # seconds between checkpoints
# Hours between failures of one GPU and its share of the node: an assumption. Llama 3 405B: 419 unexpected interruptions
# of 16384 GPUs in 54 days, one in 50,700 GPU hours.
FAILURE_HOURS = 50_000
SEARCH, METADATA, INDEX = 65 / 16, 4 / 16, 1 / 16  # bytes per sparse weight, as in roofline.pack_bytes
PACK = 97 / 16  # both forms from fp32 masters, metadata known
PACK_GATHERED = (2 * (16 * 2 + 1) + 32 + 4) / 16  # each form from gathered bf16 weights at its own time, with metadata
MASK_INTERVAL, CHECK_INTERVAL = 40, 1000  # steps, train.py's

GPT2 = {"vocab_size": 50304, "bias": False}
# Shape, and sequences of a step: 524,288 tokens as config/train_gpt2_xl_sparse.py; twice that, since 1024 GPUs cannot
# share 512 sequences; 4,194,304 tokens.
MODELS = {
    "1.5B": (GPTConfig(block_size=1024, **GPT2, **PRESETS["1558M"]), (512, 1024)),
    "7B": (GPTConfig(block_size=2048, n_layer=32, n_head=32, n_embd=4096, **GPT2), (2048,)),
}


@dataclass(frozen=True)
class Network:
    """Bytes/s that a GPU sends while it receives as much, in its node and out of it; seconds of a hop."""

    nvlink: float
    far: float
    hop: float = HOP
    far_hop: float = FAR_HOP


NETWORKS = {name: Network(near * 1e9 * WIRE_SHARE, far * 1e9 * WIRE_SHARE) for name, (near, far) in WIRES.items()}
FREE = Network(math.inf, math.inf, 0.0, 0.0)


@dataclass(frozen=True)
class Layout:
    """GPUs of a run, and how many of them share one copy of the training state: 1 is DDP, all of them FSDP."""

    gpus: int
    shards: int = 1

    def __post_init__(self):
        whole = self.shards >= 1 and self.gpus % self.shards == 0
        if self.gpus > NODE:
            whole = whole and self.gpus % NODE == 0 and (NODE % self.shards == 0 or self.shards % NODE == 0)
        if not whole:
            need = f"need whole nodes of {NODE}, and shards that divide gpus and a node, or are whole nodes"
            raise ValueError(f"Layout: gpus={self.gpus}, shards={self.shards}, {need}")

    @property
    def replicas(self) -> int:
        return self.gpus // self.shards

    @property
    def shard_group(self) -> tuple[int, int]:
        """GPUs of a group, and how many of them are in one node."""
        return self.shards, min(NODE, self.shards)

    @property
    def replica_group(self) -> tuple[int, int]:
        return self.replicas, min(self.replicas, max(1, NODE // self.shards))

    @property
    def apart(self) -> bool:
        """Whether shards are within nodes and replicas are not: what they send takes different wires."""
        return self.shards <= NODE < self.gpus


# ---------------------------------------------------------------------------------------------------------------------
# Collectives of a group: (GPUs, of these in one node)


def bandwidth(net: Network, group: tuple[int, int]) -> float:
    """Bytes/s around a ring. NCCL lays as many rings as a node has network cards, each leaving it through another, so
    all cards of the group's GPUs in a node carry what one GPU hands on."""
    size, near = group
    return net.nvlink if size == near else min(net.nvlink, near * net.far)


def ring_hops(net: Network, group: tuple[int, int]) -> float:
    """Seconds of the hops once around."""
    size, near = group
    return (size - size // near) * net.hop + (size // near - 1) * net.far_hop


def gather_seconds(net: Network, whole: float, group: tuple[int, int], calls: int = 1) -> float:
    """All-gathers to, or reduce-scatters of, `whole` bytes in so many calls."""
    return (group[0] - 1) / group[0] * whole / bandwidth(net, group) + calls * ring_hops(net, group)


def all_reduce_seconds(net: Network, whole: float, group: tuple[int, int], calls: int = 1) -> float:
    """All-reduces of `whole` bytes: the bytes of a ring, and the hops of a ring or of NCCL's tree, the fewer."""
    size, near = group
    tree = (near - 1) * net.hop + math.ceil(math.log2(size // near)) * net.far_hop
    hops = 2 * min(ring_hops(net, group), tree)
    return 2 * (size - 1) / size * whole / bandwidth(net, group) + calls * hops


# ---------------------------------------------------------------------------------------------------------------------
# Counts


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: of one block, of what is outside of the blocks, in matrices and in sparse matrices."""

    block: int
    root: int
    matrices: int
    sparse: int
    n_layer: int

    @property
    def parameters(self) -> int:
        return self.n_layer * self.block + self.root


def count(config: GPTConfig) -> Weights:
    """Without biases, as all of these models."""
    layers, d = config.n_layer, config.n_embd
    ffn = roofline.ffn_weights(d, config.d_ff, config.activation)
    block, embeddings = 4 * d * d + ffn, config.vocab_size * d
    root = embeddings + config.block_size * d + d
    return Weights(block + 2 * d, root, layers * block + embeddings, layers * ffn, layers)


def activation_memory(config: GPTConfig, micro_batch: int) -> float:
    """Bytes kept for the backward: per block and token the fp32 stream before each norm, both norms, q, k, v, the
    attention's output and Z in bf16 (A is made again); the bf16 logits and their gradient. Nothing is checkpointed."""
    d, hidden = config.n_embd, config.d_ff * (2 if config.activation in roofline.GATED else 1)
    token = config.n_layer * ((2 * 4 + 2 * 2 + 3 * 2 + 2) * d + 2 * hidden) + 6 * d + 4 * config.vocab_size
    return float(micro_batch * config.block_size * token)


def memory(config: GPTConfig, layout: Layout, micro_batch: int, sparse: bool) -> dict[str, float]:
    """Bytes on every GPU, by part. Weights in use are bf16; of shards, two blocks are gathered at a time and what is
    outside of blocks always, in fp32 beside autocast's bf16. Buffers hold gradients on their way: DDP's buckets all of
    them, FSDP's those of two blocks and of the outside."""
    w, shards, sharded = count(config), layout.shards, layout.shards > 1
    at_once = 2 * w.block + w.root
    packed = w.sparse * (2 / w.n_layer if sharded else 1) if sparse else 0
    return {
        "masters": 4 * w.parameters / shards,
        "gradients": 4 * w.parameters / shards,
        "moments": 8 * w.parameters / shards,
        "weights in use": 4.0 * w.block + 6.0 * w.root if sharded else 2.0 * (w.matrices - packed),
        "packed": 2 * roofline.PACKED * packed,
        "mask index": INDEX * w.sparse if sparse else 0.0,
        "buffers": 4.0 * (at_once if sharded else w.parameters) if layout.gpus > 1 else 0.0,
        "activations": activation_memory(config, micro_batch),
    }


def largest_micro_batch(config: GPTConfig, layout: Layout, sequences: int, capacity: float) -> int | None:
    """The largest divisor of a GPU's share of the `sequences` of a step that fits into `capacity` bytes, dense and 2:4;
    None where not even one does. ValueError where the sequences have no such shares."""
    if sequences % layout.gpus:
        raise ValueError(
            f"largest_micro_batch: {sequences} sequences for {layout.gpus} GPUs, need a multiple; change the batch"
        )
    share = sequences // layout.gpus
    for size in (size for size in range(share, 0, -1) if share % size == 0):
        if max(sum(memory(config, layout, size, sparse).values()) for sparse in (False, True)) <= FITS * capacity:
            return size
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Times


def communication(net: Network, config: GPTConfig, layout: Layout) -> dict[str, tuple[float, float]]:
    """(bytes that a GPU sends, seconds): "gather" twice and "scatter" once per micro-step, "all_reduce" per step. What
    is outside of blocks, gathered once in fp32, is counted as twice in bf16."""
    w, shards, replicas = count(config), layout.shard_group, layout.replica_group
    state = 4 * w.parameters / layout.shards
    calls = config.n_layer + 1 if layout.shards > 1 else math.ceil(state / BUCKET)
    sent, pair = (shards[0] - 1) / shards[0], 2 * (replicas[0] - 1) / replicas[0]
    gathered, gradients = 2 * w.parameters, 4 * w.parameters
    return {
        "gather": (sent * gathered, gather_seconds(net, gathered, shards, calls)),
        "scatter": (sent * gradients, gather_seconds(net, gradients, shards, calls)),
        "all_reduce": (pair * state, all_reduce_seconds(net, state, replicas, calls)),
    }


def refresh(gpu: roofline.GPU, net: Network, config: GPTConfig, layout: Layout) -> dict[str, float]:
    """Seconds of one mask refresh: the search among a GPU's own weights, and the all-gather of the whole index, one
    byte per 16 weights. DDP also packs metadata anew; FSDP does that with every packing."""
    w = count(config)
    metadata = METADATA if layout.shards == 1 else 0.0
    search = (SEARCH / layout.shards + metadata) * w.sparse / gpu.bandwidth
    calls = 2 * config.n_layer if layout.shards > 1 else 0
    return {"search": search, "gather": gather_seconds(net, INDEX * w.sparse, layout.shard_group, calls)}


def check_seconds(gpu: roofline.GPU, config: GPTConfig, layout: Layout, sparse: bool) -> float:
    """The checksum of a GPU's own weights and its index, each read once; none where there is no other GPU."""
    w = count(config)
    own = 4 * w.parameters / layout.shards + (INDEX * w.sparse if sparse else 0)
    return own / gpu.bandwidth if layout.gpus > 1 else 0.0


def local_parts(gpu, config: GPTConfig, layout: Layout, size: int, steps: int, ratio: float | None) -> dict[str, float]:
    """Seconds of roofline.train_step by part, with `packing` apart; of shards a GPU updates its own alone, and what
    casts weights is the gathering: the result written, then read and written again as weights."""
    shape = (config.n_layer, config.n_embd, config.d_ff, config.vocab_size, config.block_size, size, config.activation)
    sparse = {"ratio": ratio, "accumulation": math.inf} if ratio else None  # of infinitely many: no packing
    parts = {k: ms / 1e3 for k, ms in roofline.train_step(gpu, *shape, steps, sparse)["parts"].items()}
    w, shards = count(config), layout.shards
    packing = PACK
    if shards > 1:
        sums = 12 * w.parameters / shards * (steps - 1) / steps
        parts["casts"] = steps * (2 * 6 * w.parameters + 6 * w.matrices + sums) / gpu.bandwidth
        parts |= {name: parts[name] / shards for name in ("clip", "optimizer")}
        packing = steps * PACK_GATHERED
    return parts | {"packing": packing * w.sparse / gpu.bandwidth if ratio else 0.0}


def step(
    gpu: roofline.GPU,
    net: Network,
    config: GPTConfig,
    layout: Layout,
    size: int,
    steps: int = 1,
    ratio: float | None = None,
    mask_interval: int = MASK_INTERVAL,
    check_interval: int = CHECK_INTERVAL,
) -> dict:
    """One optimizer step of `steps` micro-batches of `size` sequences on every GPU; ratio: dense over sparse time of
    the feed-forward GEMMs, None for dense. Returns "seconds", "tokens_per_s" of all GPUs, "communication" (seconds,
    hidden or not), "sent" (bytes) and "parts", seconds that add up to "seconds"."""
    parts = local_parts(gpu, config, layout, size, steps, ratio)
    outside = {"clip", "optimizer"} | (set() if layout.shards > 1 else {"packing"})  # of micro-steps
    micro = sum(seconds for name, seconds in parts.items() if name not in outside) / steps
    wires = communication(net, config, layout)
    gather, scatter, reduce = (wires[name][1] for name in ("gather", "scatter", "all_reduce"))
    forward, backward = (1 - BACKWARD) * micro, BACKWARD * micro
    parts["exposed"] = steps * max(0.0, gather - forward) + (steps - 1) * max(0.0, gather + scatter - backward)
    last = max(gather + scatter, reduce) if layout.apart else gather + scatter + reduce
    parts["exposed"] += max(0.0, last - backward)
    parts["refresh"] = sum(refresh(gpu, net, config, layout).values()) / mask_interval if ratio else 0.0
    parts["check"] = check_seconds(gpu, config, layout, bool(ratio)) / check_interval
    seconds = sum(parts.values())
    times = {"gather": 2 * steps, "scatter": steps, "all_reduce": 1}
    return {
        "seconds": seconds,
        "tokens_per_s": layout.gpus * size * steps * config.block_size / seconds,
        "communication": sum(times[name] * wires[name][1] for name in times),
        "sent": sum(times[name] * wires[name][0] for name in times),
        "parts": parts,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and failures


def checkpoint(pcie: float, config: GPTConfig, layout: Layout, sparse: bool = True) -> dict[str, float]:
    """Bytes of a checkpoint (masters, moments and index); seconds of the pause, a copy to host memory, and of the
    write: "single" file, all of it through one GPU's link and one node, or "shards", each GPU and each node of one
    replica its own. What brings the shards together for a single file is left out."""
    w = count(config)
    size = 12.0 * w.parameters + (INDEX * w.sparse if sparse else 0)
    nodes = max(1, layout.shards // NODE)
    return {
        "bytes": size,
        "pause_single": size / pcie,
        "pause_shards": size / layout.shards / pcie,
        "write_single": size / DISK,
        "write_shards": size / (nodes * DISK),
    }


def save_share(blocked: float, every: float = SAVE_EVERY) -> float:
    """Share of the time that training stands still `blocked` seconds after each `every` seconds."""
    return blocked / (every + blocked)


def lost_share(blocked: float, every: float, gpus: int) -> float:
    """Share of the work lost to saving and, half an interval at each failure, to what was not saved (Young 1974)."""
    return blocked / every + every / 2 / (3600 * FAILURE_HOURS / gpus)


def best_interval(blocked: float, gpus: int) -> float:
    """Young's interval between checkpoints, seconds: where `lost_share` is least."""
    return math.sqrt(2 * blocked * 3600 * FAILURE_HOURS / gpus)


# ---------------------------------------------------------------------------------------------------------------------
# Tables: (title, head, rows)


def cases(gpus: tuple[int, ...]) -> list[tuple[int, str, Layout]]:
    return [(n, name, layout) for n in gpus for name, layout in layouts(n).items()]


def layouts(gpus: int) -> dict[str, Layout]:
    """By name: DDP, HSDP with a group per node, FSDP over all."""
    found = {"one GPU": 1} if gpus == 1 else {"DDP": 1} | ({"HSDP": NODE} if gpus > NODE else {}) | {"FSDP": gpus}
    return {name: Layout(gpus, shards) for name, shards in found.items()}


def memory_table(gpus: tuple[int, ...]) -> tuple[str, list[str], list[list[str]]]:
    rows, start = [], {name: n for n, name, _ in reversed(cases(gpus))}
    for model, (config, _) in MODELS.items():
        for n, name, layout in cases(gpus):
            if name != "FSDP" and n != start[name]:
                continue  # the same for every n
            for kind in ("dense", "2:4"):
                parts = memory(config, layout, 1, kind == "2:4")
                cells = [f"{value / 1e9:.2f}" for value in (*parts.values(), sum(parts.values()))]
                rows.append([model, f"{name} {n}" if name == "FSDP" else name, kind, *cells])
    return "Memory per GPU, GB, with one sequence:", ["model", "layout", "", *parts, "sum"], rows


def step_rows(name: str, model: str, sequences: int, gpus: int) -> list[list[str]]:
    gpu, net, (config, _) = roofline.GPUS[name], NETWORKS[name], MODELS[model]
    rows, start = [], [model, f"{sequences * config.block_size:,}", str(gpus)]
    for title, layout in layouts(gpus).items():
        if sequences % gpus:
            return [[*start, f"cannot share {sequences} sequences", *[""] * 9]]
        size = largest_micro_batch(config, layout, sequences, MEMORY[name])
        if size is None:
            least = min(sum(memory(config, layout, 1, sparse).values()) for sparse in (False, True))
            rows.append([*start, title, f"needs {least / 1e9:.0f} GB", *[""] * 8])
            continue
        steps = sequences // gpus // size
        at = partial(step, gpu, config=config, layout=layout, size=size, steps=steps)
        dense, *sparse = (at(net, ratio=ratio) for ratio in (None, 1.5, 2.0))
        free = [at(FREE, ratio=ratio)["seconds"] for ratio in (None, 1.5, 2.0)]
        used = (sum(memory(config, layout, size, sparse).values()) / 1e9 for sparse in (False, True))
        exposed = (1e3 * one["parts"]["exposed"] for one in (dense, sparse[-1]))
        speed = [
            f"{dense['seconds'] / one['seconds']:.2f} ({free[0] / alone:.2f})"
            for one, alone in zip(sparse, free[1:], strict=True)
        ]
        cells = [title, f"{size} x {steps}", " / ".join(f"{gb:.0f}" for gb in used), f"{dense['sent'] / 1e9:.1f}"]
        cells += [f"{1e3 * dense['communication']:.1f}", " / ".join(f"{ms:.1f}" for ms in exposed)]
        rows.append([*start, *cells, f"{1e3 * dense['seconds']:.1f}", *speed, f"{dense['tokens_per_s']:,.0f}"])
    return rows


def step_table(name: str, gpus: tuple[int, ...]) -> tuple[str, list[str], list[list[str]]]:
    head = ["model", "tokens a step", "GPUs", "layout", "micro-batch", "GB, dense / 2:4", "GB sent", "communication ms"]
    head += ["exposed ms, dense / s = 2", "dense ms", "S, s = 1.5", "S, s = 2", "dense tokens/s"]
    rows = []
    for model, (_, batches) in MODELS.items():
        for sequences, n in [(sequences, n) for sequences in batches for n in sorted({1, *gpus})]:
            rows += step_rows(name, model, sequences, n)
    return "A step; S is dense over sparse time, in brackets with communication that costs nothing:", head, rows


def upkeep_table(name: str, gpus: tuple[int, ...]) -> tuple[str, list[str], list[list[str]]]:
    """What is due beside steps, of the layouts that fit."""
    gpu, net, rows = roofline.GPUS[name], NETWORKS[name], []
    for model, (config, _) in MODELS.items():
        for n, title, layout in cases(gpus):
            if largest_micro_batch(config, layout, n, MEMORY[name]) is None:
                continue
            found, saved = refresh(gpu, net, config, layout), checkpoint(PCIE[name], config, layout)
            check = check_seconds(gpu, config, layout, True)
            microseconds = (1e6 * sum(found.values()) / MASK_INTERVAL, 1e6 * check / CHECK_INTERVAL)
            cells = [" + ".join(f"{1e3 * one:.2f}" for one in found.values()), f"{1e3 * check:.2f}"]
            cells += [" / ".join(f"{one:.0f}" for one in microseconds), f"{saved['bytes'] / 1e9:.1f}"]
            cells += [f"{saved[f'pause_{how}']:.2f} + {saved[f'write_{how}']:.1f}" for how in ("single", "shards")]
            waits = [saved[f"pause_{how}"] + saved[f"write_{how}"] for how in ("single", "shards")]
            waits.append(saved["pause_shards"])
            cells += [" / ".join(f"{100 * save_share(wait):.2f}" for wait in waits), f"{FAILURE_HOURS / n:.0f}"]
            for wait, write in ((waits[0], 0.0), (waits[2], saved["write_shards"])):
                every = max(best_interval(wait, n), write)  # one write has to end before the next begins
                cells.append(f"{every / 60:.1f}: {100 * lost_share(wait, every, n):.2f}")
            rows.append([model, str(n), title, *cells])
    head = ["model", "GPUs", "layout", "refresh ms, search + gather", "checksum ms", "both, us a step", "checkpoint GB"]
    head += ["one file s, pause + write", "in shards s", "% of time: one file / in shards / asynchronous"]
    head += ["hours to a failure", "Young, one file: minutes: % lost", "Young, asynchronous"]
    return "Beside the steps:", head, rows


def model_text(model: str) -> str:
    config, batches = MODELS[model]
    w, shape = count(config), f"n_layer {config.n_layer}, n_embd {config.n_embd}, d_ff {config.d_ff}"
    shape += f", block_size {config.block_size}, vocab_size {config.vocab_size}"
    steps = " or ".join(f"{sequences * config.block_size:,}" for sequences in batches)
    return f"{model}: {w.parameters:,} parameters, {w.sparse:,} of them sparse ({shape}); {steps} tokens a step."
