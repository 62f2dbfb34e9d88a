"""The plan for many GPUs is arithmetic that a reader can redo: parts by hand, limits, and what must not grow."""

import math
from pathlib import Path

import pytest
import torch

import bench
import cluster
import roofline
from cluster import FREE, Layout, Network
from model import GPT, GPTConfig
from roofline import GPU, GPUS

ROOT = Path(__file__).resolve().parent.parent
TINY = GPTConfig(n_layer=3, n_embd=64, n_head=1, block_size=32, vocab_size=128, bias=False)
XL, SEVEN = (cluster.MODELS[name][0] for name in ("1.5B", "7B"))
NET = cluster.NETWORKS["h100"]
# of TINY: 4 d^2 + 8 d^2 and two norms in a block; embeddings and the last norm outside
BLOCK, ROOT_WEIGHTS = 12 * 64**2 + 2 * 64, (128 + 32 + 1) * 64
P, SPARSE = 3 * BLOCK + ROOT_WEIGHTS, 3 * 8 * 64**2


@pytest.mark.parametrize("config", [TINY, XL, SEVEN], ids=["tiny", "1.5B", "7B"])
def test_parameters_are_the_models(config):
    with torch.device("meta"):
        model = GPT(config)
    assert cluster.count(config).parameters == model.get_num_params(non_embedding=False)
    linears = [module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert cluster.count(config).matrices == sum(linears)
    assert cluster.count(config).sparse == sum(n for n in linears if n == 4 * config.n_embd**2)


def test_counts_by_hand():
    w = cluster.count(TINY)
    assert (w.block, w.root, w.sparse, w.parameters) == (BLOCK, ROOT_WEIGHTS, SPARSE, P)
    assert cluster.count(SEVEN).parameters == 32 * (12 * 4096**2 + 2 * 4096) + (50304 + 2048 + 1) * 4096


def test_collectives_by_hand():
    net = Network(nvlink=10.0, far=2.0, hop=1.0, far_hop=100.0)
    assert cluster.gather_seconds(net, 100, (4, 4)) == pytest.approx(75 / 10 + 3)
    assert cluster.all_reduce_seconds(net, 100, (4, 4)) == pytest.approx(150 / 10 + 2 * 3)
    # 16 GPUs of two nodes: eight cards of 2 B/s carry more than NVLink's 10; one GPU a node has its own alone
    assert cluster.bandwidth(net, (16, 8)) == 10
    assert cluster.bandwidth(net, (8, 2)) == 4
    assert cluster.gather_seconds(net, 16, (2, 1), calls=3) == pytest.approx(8 / 2 + 3 * 100)
    assert cluster.ring_hops(net, (1024, 8)) == 896 * 1 + 127 * 100
    assert cluster.all_reduce_seconds(net, 0, (1024, 8)) == 2 * (7 + 7 * 100)  # a tree over 128 nodes is 7 deep


def test_bandwidths_are_those_of_the_data_sheets():
    assert cluster.WIRES.keys() == cluster.PCIE.keys() == cluster.MEMORY.keys() == roofline.GPUS.keys()
    assert (NET.nvlink, NET.far) == (360e9, 40e9)
    assert cluster.bandwidth(NET, Layout(64).replica_group) == 320e9  # eight cards of a node
    llama = 16384 * 54 * 24 / 419
    assert llama == pytest.approx(cluster.FAILURE_HOURS, rel=0.02)


@pytest.mark.parametrize("args", [(12,), (64, 3), (64, 12), (64, 0), (64, 128)])
def test_layouts_of_broken_nodes_are_refused(args):
    with pytest.raises(ValueError, match=f"gpus={args[0]}, .*need whole nodes of 8"):
        Layout(*args)


def test_groups():
    assert (Layout(64).shard_group, Layout(64).replica_group) == ((1, 1), (64, 8))
    assert (Layout(64, 8).shard_group, Layout(64, 8).replica_group) == ((8, 8), (8, 1))
    assert (Layout(64, 2).shard_group, Layout(64, 2).replica_group) == ((2, 2), (32, 4))
    assert (Layout(64, 16).shard_group, Layout(64, 16).replica_group) == ((16, 8), (4, 1))
    assert Layout(8, 2).replica_group == (4, 4)
    assert [Layout(*one).apart for one in ((64, 8), (64, 16), (8, 2))] == [True, False, False]


def test_memory_by_hand():
    ddp = cluster.memory(TINY, Layout(8), 2, sparse=True)
    activations = 2 * 32 * (3 * (20 * 64 + 2 * 256) + 6 * 64 + 4 * 128)
    matrices = 3 * 12 * 64**2 + 128 * 64
    assert ddp == {
        "masters": 4 * P,
        "gradients": 4 * P,
        "moments": 8 * P,
        "weights in use": 2 * (matrices - SPARSE),
        "packed": 2.25 * SPARSE,
        "mask index": SPARSE / 16,
        "buffers": 4 * P,
        "activations": activations,
    }
    hsdp = cluster.memory(TINY, Layout(64, 8), 2, sparse=True)
    gathered = 2 * BLOCK + ROOT_WEIGHTS  # the root's in fp32, and once more in bf16
    assert [hsdp[name] for name in ("masters", "gradients", "moments")] == [P / 2, P / 2, P]
    assert (hsdp["weights in use"], hsdp["buffers"], hsdp["packed"]) == (
        2 * 2 * BLOCK + (4 + 2) * ROOT_WEIGHTS,
        4 * gathered,
        2.25 * SPARSE * 2 / 3,
    )
    assert hsdp["mask index"] == SPARSE / 16  # whole on every GPU
    dense = cluster.memory(TINY, Layout(1), 2, sparse=False)
    assert (dense["packed"], dense["mask index"], dense["buffers"]) == (0, 0, 0)
    assert dense["weights in use"] == 2 * matrices


def test_micro_batch_is_the_largest_that_fits():
    layout, gb = Layout(64, 8), 1e9
    assert cluster.largest_micro_batch(SEVEN, layout, 2048, 80 * gb) == 4
    assert sum(cluster.memory(SEVEN, layout, 4, True).values()) < 0.9 * 80 * gb
    assert sum(cluster.memory(SEVEN, layout, 8, True).values()) > 0.9 * 80 * gb
    assert cluster.largest_micro_batch(SEVEN, Layout(64), 2048, 80 * gb) is None
    with pytest.raises(ValueError, match="512 sequences for 1024 GPUs, need a multiple"):
        cluster.largest_micro_batch(XL, Layout(1024), 512, 80 * gb)


@pytest.mark.parametrize("ratio", [None, 1.5, 2.0])
def test_one_gpu_is_the_roofline(ratio):
    """No communication, and the refresh and the packing that the roofline counts in its blocks."""
    sparse = {"ratio": ratio, "mask_interval": cluster.MASK_INTERVAL} if ratio else None
    expected = roofline.train_step(GPUS["h100"], 48, 1600, 6400, 50304, 1024, 4, accumulation=8, sparse=sparse)
    found = cluster.step(GPUS["h100"], NET, XL, Layout(1), 4, 8, ratio)
    assert found["seconds"] == pytest.approx(expected["ms"] / 1e3, rel=1e-12)
    assert found["tokens_per_s"] == pytest.approx(expected["tokens_per_s"])
    assert found["communication"] == found["sent"] == found["parts"]["exposed"] == found["parts"]["check"] == 0


def test_free_communication_leaves_the_step_of_one_gpu():
    one, many = (cluster.step(GPUS["h100"], FREE, XL, Layout(n), 8, 2, 2.0) for n in (1, 64))
    assert many["communication"] == 0
    assert many["seconds"] - many["parts"]["check"] == pytest.approx(one["seconds"])
    wide = cluster.step(GPUS["h100"], FREE, XL, Layout(64, 8), 8, 2, 2.0)
    assert wide["communication"] == wide["parts"]["exposed"] == 0


def test_what_is_sent_by_hand():
    """Ring: DDP 2 (n - 1)/n of the fp32 gradients; FSDP (n - 1)/n of 2 + 2 + 4 bytes a weight in every micro-step."""
    ddp = cluster.step(GPUS["h100"], NET, TINY, Layout(64), 1, 3)
    assert ddp["sent"] == pytest.approx(2 * 63 / 64 * 4 * P)
    fsdp = cluster.step(GPUS["h100"], NET, TINY, Layout(64, 64), 1, 3)
    assert fsdp["sent"] == pytest.approx(3 * 63 / 64 * 8 * P)
    hsdp = cluster.step(GPUS["h100"], NET, TINY, Layout(64, 8), 1, 3)
    assert hsdp["sent"] == pytest.approx(3 * 7 / 8 * 8 * P + 2 * 7 / 8 * 4 * P / 8)
    wires = cluster.communication(NET, SEVEN, Layout(64, 8))
    weights = cluster.count(SEVEN).parameters
    assert wires["gather"][1] == pytest.approx(7 / 8 * 2 * weights / 360e9 + 33 * 7 * cluster.HOP)
    hops = 33 * 2 * 3 * cluster.FAR_HOP
    assert wires["all_reduce"][1] == pytest.approx(2 * 7 / 8 * 4 * weights / 8 / 40e9 + hops)
    ddp = cluster.communication(NET, XL, Layout(64))["all_reduce"][1]
    weights = cluster.count(XL).parameters
    hops = math.ceil(4 * weights / 25 / 2**20) * 2 * (7 * cluster.HOP + 3 * cluster.FAR_HOP)
    assert ddp == pytest.approx(2 * 63 / 64 * 4 * weights / 320e9 + hops)


def test_hsdp_of_one_group_is_fsdp_and_reduces_nothing():
    wires = cluster.communication(NET, SEVEN, Layout(64, 64))
    assert wires["all_reduce"] == (0, 0)
    memory = cluster.memory(SEVEN, Layout(64, 64), 1, False)
    assert memory["masters"] == 4 * cluster.count(SEVEN).parameters / 64
    assert cluster.layouts(64)["FSDP"] == Layout(64, 64)
    assert cluster.layouts(8) == {"DDP": Layout(8), "FSDP": Layout(8, 8)}  # one node: HSDP would be the same


@pytest.mark.parametrize("layout", [Layout(64), Layout(64, 8), Layout(64, 16), Layout(64, 64)], ids=str)
def test_exposed_by_hand(layout):
    """Over wires so slow that nothing is hidden but the passes themselves, and over wires that hide everything."""
    gpu, steps = GPUS["h100"], 3
    slow = Network(1e6, 1e6, 0.0, 0.0)
    found = cluster.step(gpu, slow, TINY, layout, 4, steps)
    wires = {name: seconds for name, (_, seconds) in cluster.communication(slow, TINY, layout).items()}
    micro = sum(found["parts"][name] for name in ("blocks", "lm_head", "cross_entropy", "casts"))
    micro = (micro + found["parts"]["embeddings_and_last_norm"]) / steps
    every = 2 * wires["gather"] + wires["scatter"]
    reduced = wires["all_reduce"]
    if layout.apart and layout.shards > 1:
        reduced = max(0.0, reduced - wires["gather"] - wires["scatter"])
    hidden = micro * (steps if layout.shards > 1 else cluster.BACKWARD)  # the forward has nothing to hide under DDP
    assert found["parts"]["exposed"] == pytest.approx(steps * every + reduced - hidden)
    assert cluster.step(gpu, NET, SEVEN, layout, 8, 4)["parts"]["exposed"] == 0


def test_local_work_of_shards_by_hand():
    """A GPU that copies 1 B/s and multiplies in no time: seconds are bytes."""
    slow, steps = GPU(math.inf, 1.0), 2
    dense, sparse = (cluster.local_parts(slow, TINY, Layout(64, 8), 1, steps, ratio) for ratio in (None, 2.0))
    whole = cluster.local_parts(slow, TINY, Layout(64), 1, steps, None)
    matrices = 3 * 12 * 64**2 + 128 * 64
    assert dense["casts"] == pytest.approx(steps * (12 * P + 6 * matrices) + 12 * P / 8)
    assert sparse["casts"] == dense["casts"]  # gathered all the same
    assert dense["optimizer"] == pytest.approx(whole["optimizer"] / 8)
    assert dense["clip"] == pytest.approx(whole["clip"] / 8)
    # each form reads bf16 weights and the index, writes values and metadata: 32 + 1 + 16 + 2 bytes of 16 weights
    assert sparse["packing"] == pytest.approx(steps * 2 * 51 / 16 * SPARSE)
    assert cluster.local_parts(slow, TINY, Layout(64), 1, steps, 2.0)["packing"] == pytest.approx(97 / 16 * SPARSE)


def test_refresh_and_checksum_by_hand():
    gpu, net = GPU(1.0, 1.0), Network(10.0, 10.0, 0.0, 0.0)
    ddp, hsdp = (cluster.refresh(gpu, net, TINY, layout) for layout in (Layout(64), Layout(64, 8)))
    assert ddp == {"search": pytest.approx(69 / 16 * SPARSE), "gather": 0}
    assert hsdp["search"] == pytest.approx(65 / 16 * SPARSE / 8)
    assert hsdp["gather"] == pytest.approx(7 / 8 * SPARSE / 16 / 10)
    assert cluster.check_seconds(gpu, TINY, Layout(64, 8), True) == pytest.approx(4 * P / 8 + SPARSE / 16)
    assert cluster.check_seconds(gpu, TINY, Layout(64), False) == 4 * P
    seldom, often = (cluster.step(gpu, net, TINY, Layout(64), 1, 1, 2.0, one, one)["parts"] for one in (80, 40))
    assert often["refresh"] == pytest.approx(2 * seldom["refresh"])
    assert often["check"] == pytest.approx(2 * seldom["check"])


@pytest.mark.parametrize("layout", [Layout(1024), Layout(1024, 8), Layout(1024, 1024)], ids=str)
@pytest.mark.parametrize("ratio", [None, 2.0])
def test_parts_add_up_and_slower_wires_only_cost(layout, ratio):
    nets = [Network(NET.nvlink * k, NET.far * k, NET.hop / k, NET.far_hop / k) for k in (0.1, 0.5, 1, 10)]
    found = [cluster.step(GPUS["h100"], net, SEVEN, layout, 2, 1, ratio) for net in (*nets, FREE)]
    for one in found:
        assert one["seconds"] == sum(one["parts"].values())
        assert all(seconds >= 0 for seconds in one["parts"].values())
    assert [one["seconds"] for one in found] == sorted((one["seconds"] for one in found), reverse=True)


@pytest.mark.parametrize("shards", [1, 8])
def test_communication_eats_the_speed_up(shards):
    def s(net, gpus):
        dense, sparse = (cluster.step(GPUS["h100"], net, SEVEN, Layout(gpus, shards), 1, 1, r) for r in (None, 2.0))
        return dense["seconds"] / sparse["seconds"]

    assert s(NET, 1024) < s(FREE, 1024)
    slower = [Network(NET.nvlink / k, NET.far / k) for k in (1, 4, 16)]
    found = [s(net, 1024) for net in slower]
    assert found[0] > max(found[1:])
    assert found[-1] == pytest.approx(1, abs=0.02)  # all that is left is communication


def test_more_gpus_sharing_a_batch_are_faster_but_not_in_proportion():
    times = [cluster.step(GPUS["h100"], NET, SEVEN, Layout(n, 8), 1, 2048 // n)["seconds"] for n in (64, 256, 1024)]
    assert times[0] > times[1] > times[2] > times[0] / 16


def test_checkpoint_by_hand():
    found = cluster.checkpoint(25e9, TINY, Layout(64, 16))
    size = 12 * P + SPARSE / 16
    assert found == {
        "bytes": size,
        "pause_single": size / 25e9,
        "pause_shards": size / 16 / 25e9,
        "write_single": size / 2e9,
        "write_shards": size / 4e9,
    }
    assert cluster.checkpoint(25e9, TINY, Layout(64), False)["write_shards"] == 12 * P / 2e9
    assert cluster.save_share(0) == 0
    assert cluster.save_share(100, every=300) == 0.25


def test_youngs_interval_is_the_best():
    assert cluster.best_interval(10.0, 1000) == pytest.approx(math.sqrt(2 * 10 * 50 * 3600))
    assert cluster.lost_share(10.0, 600.0, 1000) == pytest.approx(10 / 600 + 300 / (50 * 3600))
    best = cluster.best_interval(10.0, 1000)
    assert all(cluster.lost_share(10, best, 1000) < cluster.lost_share(10, k * best, 1000) for k in (0.8, 1.25))


def test_results_hold_what_is_printed(capsys):
    bench.main(["--predict", "--gpus"])
    text = capsys.readouterr().out
    assert (ROOT / "results" / "cluster.md").read_text() == text, (
        "python bench.py --predict --gpus > results/cluster.md"
    )
    assert text.startswith("A plan for 64 and 1024 GPUs, predicted and not measured")
    assert all(f"{name.upper()}, predicted and not measured" in text for name in GPUS)
    for rows in (line for line in text.split("\n\n") if line.startswith("|")):
        assert len({row.count("|") for row in rows.splitlines()}) == 1, rows
    assert "| 1.5B | 524,288 | 1024 | cannot share 512 sequences |" in text


def test_bench_says_what_it_cannot_plan():
    with pytest.raises(SystemExit, match="--gpus is what --predict plans for"):
        bench.main(["--gpus", "64"])
    with pytest.raises(SystemExit, match=r"gpus=12, .*need whole nodes"):
        bench.main(["--predict", "h100", "--gpus", "12"])
