"""Tables and a figure of the evidence from one GPU: python -m benchmarks.report results/h200

Reads results/<gpu>/evidence/*.json, which `bench.py --evidence` wrote, and writes results/<gpu>/README.md and
evidence.png. Stages without a file are left out. No number is typed by hand.
"""

import re
import sys
from pathlib import Path

from benchmarks import kernel_times
from benchmarks.machine import read_json
from runtime.plot import COLOURS

PRODUCTS = ("z", "y", "da", "dx", "dw1", "dw2")
KINDS = (  # (kind of kernel, pattern of its name); the first match counts
    ("2:4 products", r"sparse_gemm"),
    ("dense products", r"nvjet|cublas|splitK|gemm"),
    ("attention", r"cudnn|flash|fmha"),
    ("activation, MVUE, packing (ours)", r"_mvue24|_activation_kernel|_pack_weight"),
    ("gelu (the compiler's)", r"gelu"),
    ("AdamW (ours)", r"_adamw"),
)
LABELS = {  # newer names of rows that the probe at b79c636 wrote
    "cusparselt": "2:4 by torch's op, as a custom op",
    "cusparselt-plan": "2:4 by cached plans, as a custom op",
    "raw torch op": "2:4 by torch's op",
}


def load(folder: Path, name: str) -> dict | None:
    return read_json(folder / "evidence" / f"{name}.json")


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def with_spread(s: dict) -> str:
    return f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"


def machine_text(probe: dict) -> str:
    m, version = probe["machine"], probe["machine"]["cusparselt"]
    shapes = [row for name, row in probe["order"].items() if re.fullmatch(r"\d+x\d+", name)]
    packed = all(row.get("sm90") is True and not row["padding"] for row in shapes)
    where = f"at all {len(shapes)} shapes tried, without padding" if packed else "but not at every shape"
    calls = {name.removesuffix(" us"): us for name, us in probe["host"].items() if name.endswith(" us")}
    replays = {name: all(right) for name, right in probe["graph"].items() if isinstance(right, list)}
    replay_texts = [f"{LABELS.get(name, name)}: {right}" for name, right in replays.items()]
    parts = [
        f"{m['device_name']}, torch {m['torch']}, triton {m['triton']}, cuSPARSELt {version // 1000}."
        f"{version // 100 % 10}.{version % 100}. A copy moves {m['copy_tb_per_s']:.2f} TB/s. A product of random bf16 "
        f"matrices, 8192 x 8192 x 8192, runs at {m['product_tflops']:.0f} TFLOP/s. Triton kernels: "
        f"{probe['kernels']['status']}.",
        f"cuSPARSELt {probe['order']['why']}, {where}.",
        f"A captured product is right at every replay. {'; '.join(replay_texts)}.",
        table(["time of one call", "us"], [[LABELS.get(name, name), f"{us:.0f}"] for name, us in calls.items()]),
    ]
    return "\n\n".join(parts)


def gemm_rows(gemm: dict) -> dict[int, dict[str, dict]]:
    """{width: {product: row}}"""
    by_width: dict[int, dict[str, dict]] = {}
    for row in gemm["suites"]["gemm"]["rows"]:
        if row.get("ratio"):
            by_width.setdefault(row["d"], {})[row["name"]] = row
    return dict(sorted(by_width.items()))


def gemm_text(gemm: dict) -> str:
    def cell(row):
        return f"{row['dense_us']:.0f} / {row['best_us']:.0f} = {row['ratio']:.2f}"

    rows = gemm_rows(gemm)
    names = [name for name in PRODUCTS if all(name in products for products in rows.values())]
    cells = [[str(d), *(cell(products[name]) for name in names)] for d, products in rows.items()]
    all_rows = [row for products in rows.values() for row in products.values()]
    return "\n\n".join([table(["d", *names], cells), algorithms_text(all_rows)])


def algorithms_text(rows: list[dict]) -> str:
    """Compare the default algorithm with the best one, by the times of the first round of `choose`. Count the wrong
    results and the refused splits."""
    default, best, wrong, splits, split_ran = [], set(), 0, 0, 0
    for row in rows:
        us = {label.split()[-1]: us for label, us in row["algorithms_us"].items()}
        fastest = min(us, key=us.get)
        best.add(int(fastest.split("/")[0]))
        default.append(us["0/1"] / us[fastest])
        wrong += sum(not fault.startswith("raises") for fault in row["faults"].values())
        splits += sum(not label.endswith("/1") for label in row["faults"])
        split_ran += sum(not label.endswith("/1") for label in us)
    return (
        f"cuSPARSELt's default algorithm, 0, takes {min(default):.2f} to {max(default):.2f} times as long as the best "
        f"one; the best ids are {', '.join(map(str, sorted(best)))}. {wrong} algorithms gave a wrong result. The "
        f"library refused {splits} of {splits + split_ran} splits of the sum (split-k)."
    )


def ffn_rows(ffn: dict) -> list[dict]:
    return [row for row in ffn["suites"]["ffn"]["rows"] if row.get("s", {}).get("auto")]


def s_of_micro_steps(row: dict, count: int) -> float:
    """S of a layer that is packed once per `count` micro-steps, from the medians of a row that packs in each."""
    dense, auto = row["variants"]["dense"], row["variants"]["auto"]
    pack, refresh = auto["pack_ms"]["median"], auto["refresh_ms"]["median"] / 40
    unpacked = auto["ms"]["median"] - pack - refresh
    return dense["ms"]["median"] / (unpacked + (pack + refresh) / count)


def ffn_text(ffn: dict) -> str:
    cells = []
    for row in ffn_rows(ffn):
        dense, auto = row["variants"]["dense"], row["variants"]["auto"]
        ms = [f"{one['ms']['median']:.3f}" for one in (dense, auto)]
        s = [with_spread(row["s"]["auto"]), f"{s_of_micro_steps(row, 4):.2f}"]
        host = f"{dense['host_us'] / 1000:.1f} / {auto['host_us'] / 1000:.1f}"
        cells.append([row["activation"], str(row["d"]), *ms, *s, f"{auto['pack_ms']['median']:.2f}", host])
    head = ["activation", "d", "dense ms", "2:4 ms", "S, packed each time", "S, packed every 4th (computed)"]
    return table([*head, "packing ms", "host ms, dense / 2:4"], cells)


def act24_text(ffn: dict) -> str:
    cells = []
    for row in ffn_rows(ffn):
        variants, s = row["variants"], row["s"]
        ms = [f"{variants[name]['ms']['median']:.3f}" for name in ("dense", "gelu", "auto")]
        host = " / ".join(f"{variants[name]['host_us'] / 1000:.1f}" for name in ("dense", "auto"))
        cells.append([str(row["d"]), *ms, with_spread(s["auto"]), with_spread(s["gelu"]), row["plan"], host])
    head = ["d", "dense relu2 ms", "dense gelu ms", "2:4 ms", "S against relu2", "S against gelu", "products"]
    return table([*head, "host ms, dense / 2:4"], cells)


def curves_text(train: dict) -> str:
    """The training loss of some steps, and the loss on the validation split at the end."""
    cells = []
    for name, run in train["runs"].items():
        losses = {row["iter"]: row["train_loss"] for row in run["rows"] if row.get("train_loss")}
        val = [row["val_loss"] for row in run["rows"] if row.get("val_loss")]
        some = [f"{losses[i]:.3f}" if i in losses else "" for i in (50, 100, 200, 290)]
        cells.append([name, *some, f"{val[-1]:.3f}" if val else "", str(run["exit"])])
    return table(["run", "step 50", "step 100", "step 200", "step 290", "validation", "exit status"], cells)


WAYS = {"compiled": "launched one by one", "graphs": "CUDA graphs"}


def measured(step: dict) -> list[dict]:
    """The rows without those that could not be measured, which hold a reason."""
    return [row for row in step["rows"] if "reason" not in row]


def step_text(step: dict) -> str:
    cells = []
    for row in measured(step):
        profiles = row["dense"], row["sparse"]
        for way in (way for way in WAYS if way in row):
            both = row[way]["dense"], row[way]["sparse"]
            pairs = (
                [f"{one['ms']['median']:.0f}" for one in both],
                [f"{one['tokens_per_s']:,.0f}" for one in both],
                [f"{one['mfu']:.2f}" for one in both],
                [f"{one['peak_gib']:.1f}" for one in profiles],
                [f"{one['host_us'] / 1000:.0f}" for one in profiles],
                [f"{one['launches']}" for one in profiles],
            )
            ms, *others = (" / ".join(pair) for pair in pairs)
            shape = f"{row['micro_steps']} x {row['batch']} x 1024"
            cells.append([row["size"], shape, WAYS[way], ms, with_spread(row[way]["s"]), *others])
    head = ["size", "tokens per step", "kernels", "ms", "S", "tokens/s", "MFU", "peak GiB", "host ms", "launches"]
    note = (
        "host ms is the least time in which the host enqueued a step; it waits for the GPU where the queue of launches "
        "is full. launches counts copies and fills too."
    )
    return "\n\n".join([table(head, cells), note])


def spent_ms(run: dict) -> dict[str, float]:
    """GPU milliseconds by kind of kernel. A row lists only its longest kernels; "everything else" includes the rest."""
    # Files before 12c6b30 also list the optimizer's step, which the profiler reports as a kernel.
    spent = {"everything else": run["gpu_us"]}
    for kernel, (_, us) in run["kernels"].items():
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), None)
        if kind and not kernel.startswith("Optimizer."):
            spent[kind] = spent.get(kind, 0) + us
        if kind or kernel.startswith("Optimizer."):
            spent["everything else"] -= us
    return {kind: us / 1000 for kind, us in spent.items()}


def kinds_text(step: dict) -> str:
    """Table of the GPU's time by kind of kernel, and the share that 2:4 replaces."""
    cells, readings = [], []
    for row in measured(step):
        dense, sparse = spent_ms(row["dense"]), spent_ms(row["sparse"])
        for kind in [*(kind for kind, _ in KINDS), "everything else"]:
            before, after = dense.get(kind, 0), sparse.get(kind, 0)
            if before or after:
                cells.append([row["size"], kind, f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}"])
        replaced = dense["dense products"] - sparse["dense products"] + dense["gelu (the compiler's)"]
        by = sparse["2:4 products"] + sparse["activation, MVUE, packing (ours)"]
        readings.append(
            f"{row['size']}: 2:4 replaces {replaced / sum(dense.values()):.0%} of dense's GPU time and makes it "
            f"{replaced / by:.2f} times as fast."
        )
    head = ["size", "kernels", "dense ms", "2:4 ms", "difference"]
    return "\n\n".join([table(head, cells), " ".join(readings)])


def stages_text(evidence: dict) -> str:
    cells = [
        [name, stage["status"], f"{stage['seconds']:.0f}", stage.get("commit") or stage["code"]]
        for name, stage in evidence["stages"].items()
    ]
    return table(["stage", "how it ended", "s", "commit"], cells)


# ---------------------------------------------------------------------------------------------------------------------
# The page and the figure


ACT24 = {"act24": "2:4 activations", "act24_soft": "2:4 activations and weights"}


def act24_sections(method: str, what: str) -> list[tuple]:
    return [
        (f"gemm_{method}", f"Products with {what}, 16,384 tokens: dense us / best 2:4 us = ratio", gemm_text),
        (f"ffn_{method}", f"A layer with {what}, forward and backward, 16,384 tokens, from CUDA graphs", act24_text),
        (f"step_{method}", f"Whole optimizer steps with {what}, against dense squared ReLU", step_text),
    ]


def page(folder: Path) -> str:
    evidence = load(folder, "evidence")
    parts = [
        f"# Evidence from an {evidence['device'].removeprefix('NVIDIA ')}",
        "`python bench.py --evidence OUT` measured it, `python -m benchmarks.report` made this page from the files in "
        "[evidence](evidence). S is dense time over 2:4 time; dense is compiled, in bf16. Spreads are the smallest and "
        "the largest repetition.",
        stages_text(evidence),
    ]
    sections = (
        ("probe", "The machine", machine_text),
        ("gemm", "Products of a feed-forward layer, 16,384 tokens: dense us / best 2:4 us = ratio", gemm_text),
        ("ffn", "A feed-forward layer, forward and backward, 16,384 tokens, from CUDA graphs", ffn_text),
        ("step", "Whole optimizer steps, blocks compiled one by one", step_text),
        ("step", "The GPU's time of a step, by kind of kernel", kinds_text),
        ("train", "Loss of 124M in short runs, one seed", curves_text),
        *(section for method, what in ACT24.items() for section in act24_sections(method, what)),
        ("train_act24", "Loss of 124M in short runs with squared ReLU, one seed", curves_text),
    )
    for name, title, text in sections:
        if data := load(folder, name):
            parts += [f"## {title}", text(data)]
    if kernels := load(folder, "kernels"):
        parts += ["## Kernels", kernel_times.report(kernels).partition("\n\n")[2].strip()]
    parts += ["![ratios on this GPU](evidence.png)"]
    return "\n\n".join(parts) + "\n"


def draw(folder: Path, path: Path) -> None:
    """Draw the ratios of products, layers and steps."""
    from matplotlib.figure import Figure

    def errors(spreads):
        return [[abs(one["median"] - one[end]) for one in spreads] for end in ("min", "max")]

    figure = Figure(figsize=(14, 4), layout="constrained")
    products, layers, steps = figure.subplots(1, 3)
    if gemm := load(folder, "gemm"):
        rows = gemm_rows(gemm)
        for name, colour in zip(PRODUCTS, COLOURS, strict=False):
            if name not in ("da", "dx"):  # these have the shapes of z and y
                label = {"z": "z and da", "y": "y and dx"}.get(name, name)
                ratios = [row[name]["ratio"] for row in rows.values()]
                products.plot(list(rows), ratios, "o-", color=colour, label=label)
    products.set(title="products, 16,384 tokens", xlabel="d", ylabel="dense time / 2:4 time")
    if ffn := load(folder, "ffn"):
        for activation, colour in zip(("gelu", "geglu"), COLOURS, strict=False):
            rows = sorted((r for r in ffn_rows(ffn) if r["activation"] == activation), key=lambda r: r["d"])
            d, s = [row["d"] for row in rows], [row["s"]["auto"] for row in rows]
            style = {"color": colour, "marker": "o", "capsize": 3, "label": activation}
            layers.errorbar(d, [one["median"] for one in s], errors(s), **style)
            often = [s_of_micro_steps(row, 4) for row in rows]
            layers.plot(d, often, ":", color=colour, label=f"{activation}, packed every 4th time")
    layers.set(title="feed-forward layer, forward and backward", xlabel="d", ylabel="S")
    if step := load(folder, "step"):
        rows = sorted((row for row in step["rows"] if "graphs" in row), key=lambda row: int(row["size"][:-1]))
        for offset, way, colour in ((-0.2, "compiled", COLOURS[0]), (0.2, "graphs", COLOURS[1])):
            s = [row[way]["s"] for row in rows]
            style = {"yerr": errors(s), "capsize": 3, "color": colour, "label": WAYS[way]}
            steps.bar([i + offset for i in range(len(rows))], [one["median"] for one in s], 0.4, **style)
        steps.set_xticks(range(len(rows)), [f"{row['size']}\nbatch {row['batch']}" for row in rows])
    steps.set(title="whole optimizer step", ylabel="S")
    for axes in (products, layers, steps):
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.legend(fontsize="small")
    figure.suptitle(f"{load(folder, 'evidence')['device']}: dense time over 2:4 time")
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    folder = Path(argv[0])
    (folder / "README.md").write_text(page(folder), encoding="utf-8")
    draw(folder, folder / "evidence.png")
    print(f"wrote {folder / 'README.md'} and {folder / 'evidence.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
