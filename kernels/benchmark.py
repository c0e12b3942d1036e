"""Benchmark: the fused pool + convolution against native operators, layer by layer and in a step.

    python kernels/benchmark.py                              # float32 on this machine's CPU or GPU
    python kernels/benchmark.py --layers 16,16,32 --batch 64

For each layer (C_in,C_out,output size) of ResNet-20 and each way to downsample: the median time of
native and fused, measured in turns, and native / fused; effective GFLOP/s (of the direct
convolution's operations); the shares of this machine's matrix product (all passes) and copy
bandwidth (forward: x and y once); the error against float64.
Native is the best of NCHW and channels_last, eager and torch.compile (--no-compile: eager). Then
the whole training step with both (needs common.py beside the folder). Writes --out: benchmark.json
and benchmark.png.
"""
import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels  # noqa: E402

LAYERS = ["16,16,32", "16,16,16", "16,32,32", "16,32,16", "32,32,32", "32,32,16", "32,32,8",
          "32,64,16", "32,64,8", "64,64,32", "64,64,16", "64,64,8"]
PASSES = ("forward", "grad_input", "grad_weight", "all")


class Clock:
    """Times a call in milliseconds; on a GPU by events, after a write that flushes the L2."""

    def __init__(self, device: str):
        self.cuda = "cuda" in device
        self.flush = torch.empty(64 << 20, device=device) if self.cuda else None

    def __call__(self, call) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)


def interleaved(clock: Clock, calls: dict, repeats: int) -> dict[str, np.ndarray]:
    """Quartiles (3,) of each call's milliseconds, called in turns, after two rounds to warm up."""
    times = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            elapsed = clock(call)
            if repeat >= 2:
                times[name].append(elapsed)
    return {name: np.percentile(found, [25, 50, 75]) for name, found in times.items()}


def native(x, weight, downsample):
    pooled = F.max_pool2d(x, 2) if downsample == "maxpool" else x
    return F.conv2d(pooled, weight, stride=2 if downsample == "stride" else 1, padding=1), pooled


def make_calls(pool_conv, x, weight, downsample):
    """Each pass as a call without arguments; the gradients' forward passes are made once, here."""
    wanted = [t.detach().requires_grad_() for t in (x, weight)]
    of_x = pool_conv(wanted[0], weight, downsample)[0]
    of_weight = pool_conv(x, wanted[1], downsample)[0]
    gradient = torch.randn_like(of_x)
    return dict(zip(PASSES, (
        lambda: pool_conv(x, weight, downsample),
        lambda: torch.autograd.grad(of_x, wanted[0], gradient, retain_graph=True),
        lambda: torch.autograd.grad(of_weight, wanted[1], gradient, retain_graph=True),
        lambda: torch.autograd.grad(pool_conv(*wanted, downsample)[0], wanted, gradient))))


def error(pool_conv, x, weight, downsample) -> list[float]:
    """Relative Frobenius error against float64 of y and both gradients, on four images."""
    x, weight = x[:4].detach().requires_grad_(), weight.detach().requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    y, true = pool_conv(x, weight, downsample)[0], native(*exact, downsample)[0]
    gradient = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, (x, weight), gradient)]
    true = [true, *torch.autograd.grad(true, exact, gradient.double())]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, true)]


def measure_layer(clock, args, dtype, text, downsample) -> dict:
    c_in, c_out, size = map(int, text.split(","))
    at = size if downsample == "none" else 2 * size
    x = torch.randn(args.batch, c_in, at, at, device=args.device).relu().to(dtype)
    weight = (torch.randn(c_out, c_in, 3, 3, device=args.device) / (9 * c_in) ** 0.5).to(dtype)
    last = x.to(memory_format=torch.channels_last)
    candidates = {"nchw": make_calls(native, x, weight, downsample),
                  "nhwc": make_calls(native, last, weight.to(memory_format=torch.channels_last),
                                     downsample)}
    if args.compile:
        torch._dynamo.reset()
        compiled = torch.compile(native, dynamic=False)
        candidates["compiled"] = make_calls(compiled, last, weight, downsample)
    candidates["fused"] = make_calls(kernels.pool_conv2d, last, weight, downsample)
    row = {"layer": text, "downsample": downsample, "passes": {}}
    operations = 2 * 9 * args.batch * size ** 2 * c_in * c_out
    for name in PASSES:
        found = interleaved(clock, {who: calls[name] for who, calls in candidates.items()},
                            args.repeats)
        fused = found.pop("fused")
        best = min(found, key=lambda who: found[who][1])
        row["passes"][name] = {
            "native": best, "native_ms": found[best].tolist(), "fused_ms": fused.tolist(),
            "ratio": found[best][1] / fused[1],
            "fused_gflops": operations * (3 if name == "all" else 1) / fused[1] / 1e6}
    moved = x.element_size() * (x.numel() + args.batch * size ** 2 * c_out)
    row["forward_gbs"] = moved / row["passes"]["forward"]["fused_ms"][1] / 1e6
    row["error"] = dict(zip(PASSES, error(kernels.pool_conv2d, last, weight, downsample)))
    row["native_error"] = dict(zip(PASSES, error(native, last, weight, downsample)))
    return row


def measure_step(clock, args, config) -> dict:
    """The whole training step of ResNet-20 at 32x32, only the operator exchanged."""
    import common
    network = common.ResNet20(10, supernet=True).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(args.batch, 3, 32, 32, device=args.device
                         ).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (args.batch,), device=args.device)

    def step(kernel):
        def call():
            common.choose_kernel(kernel, args.device)
            F.cross_entropy(network(images, config), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return call
    found = interleaved(clock, {kernel: step(kernel) for kernel in ("native", "fused")},
                        args.repeats)
    return {"config": common.config_name(config), "native_ms": found["native"].tolist(),
            "fused_ms": found["fused"].tolist(), "ratio": found["native"][1] / found["fused"][1]}


def machine_rates(clock, args, dtype) -> dict:
    """What this machine can do: a large matrix product, GFLOP/s, and a large copy, GB/s."""
    a, b = torch.randn(2, 2048, 2048, device=args.device).to(dtype)
    big = torch.empty(64 << 20, device=args.device)
    other = torch.empty_like(big)
    found = interleaved(clock, {"mm": lambda: torch.mm(a, b), "copy": lambda: other.copy_(big)}, 7)
    return {"mm_gflops": 2 * 2048 ** 3 / found["mm"][1] / 1e6,
            "copy_gbs": 8 * big.numel() / found["copy"][1] / 1e6}


def plot(rows: list[dict], steps: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['layer']}\n{row['downsample']}" for row in rows]
    for i, name in enumerate(PASSES):
        axes.bar(np.arange(len(rows)) + 0.2 * (i - 1.5),
                 [row["passes"][name]["ratio"] for row in rows], 0.2, label=name)
    axes.bar(np.arange(len(steps)) + len(rows), [step["ratio"] for step in steps], 0.6,
             label="training step", color="0.4")
    labels += [step["config"] for step in steps]
    axes.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90)
    axes.axhline(1, color="k", linewidth=0.8)
    axes.set(ylabel="native / fused", xlabel="C_in,C_out,output size and downsampling; "
             "configuration of a whole step")
    axes.legend(ncols=5)
    figure.savefig(path, dpi=110)


def main() -> None:
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", default="float32", choices=["float32", "float16", "bfloat16"],
        help="of layers; on a CPU only float32 has fused kernels")
    add("--batch", type=int, default=128, help="images in a batch")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--layers", nargs="+", default=LAYERS, metavar="C_IN,C_OUT,SIZE", help="layer shapes")
    add("--repeats", type=int, default=9, help="measurements of each call")
    add("--no-compile", dest="compile", action="store_false",
        help="try native operators without torch.compile only")
    add("--out", default="runs/benchmark", help="folder for benchmark.json and benchmark.png")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        kernels.load()
    except kernels.BuildError as failure:
        sys.exit(f"error: {failure}")
    clock = Clock(args.device)
    rates = machine_rates(clock, args, dtype)
    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    name = (torch.cuda.get_device_name(args.device) if clock.cuda else
            next((line.split(": ")[1] for line in cpuinfo.splitlines() if "model name" in line),
                 platform.machine()))
    print(f"{name}, {args.threads} threads, torch {torch.__version__}, {args.dtype}, batch "
          f"{args.batch}; matrix product {rates['mm_gflops']:.0f} GFLOP/s, copy "
          f"{rates['copy_gbs']:.0f} GB/s\n\nnative / fused{'':13}" + "".join(
              f"{name:>12}" for name in PASSES) + "   of product   of copy   error y, x, weight")
    rows = []
    todo = [(layer, mode) for layer in args.layers for mode in kernels.MODES]
    for layer, mode in tqdm(todo, disable=None, leave=False):
        row = measure_layer(clock, args, dtype, layer, mode)
        rows.append(row)
        share = row["passes"]["all"]["fused_gflops"] / rates["mm_gflops"]
        tqdm.write(f"{layer:>12} {mode:<13}" + "".join(
            f"{row['passes'][name]['ratio']:12.2f}" for name in PASSES) + f"{share:13.2f}"
            f"{row['forward_gbs'] / rates['copy_gbs']:10.2f}   " + " ".join(
                f"{value:.1e}" for value in row["error"].values()))
    for mode in kernels.MODES:
        ratios = np.log([[row["passes"][name]["ratio"] for name in PASSES]
                         for row in rows if row["downsample"] == mode])
        print(f"{'mean':>12} {mode:<13}" + "".join(
            f"{ratio:12.2f}" for ratio in np.exp(ratios.mean(0))) + "   (geometric)")
    steps = []
    if dtype == torch.float32 and (Path(__file__).resolve().parent.parent / "common.py").exists():
        for config in ((4, 3, 3), (1, 1, 8), (7, 1, 2)):
            steps.append(measure_step(clock, args, config))
            print("training step {config:10} native {0:7.1f} ms  fused {1:7.1f} ms  {ratio:.2f}x"
                  .format(steps[-1]["native_ms"][1], steps[-1]["fused_ms"][1], **steps[-1]))
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    plot(rows, steps, folder / "benchmark.png")
    (folder / "benchmark.json").write_text(json.dumps(
        {"command": " ".join(sys.argv), "device": name, "threads": args.threads,
         "torch": torch.__version__, "dtype": args.dtype, "batch": args.batch, "rates": rates,
         "times": "milliseconds: 25 %, median, 75 %", "layers": rows, "steps": steps}, indent=1))
    print(f"written: {folder}/benchmark.json, {folder}/benchmark.png")


if __name__ == "__main__":
    main()
