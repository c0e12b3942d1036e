"""Benchmark: the fused kernels against native operators, by layers and in whole training steps.

    python kernels/benchmark.py         # on this machine's CPU or GPU; a CPU takes 3 minutes

For each layer (C_in,C_out,output size), alone and behind a max-pool, and for each pass: the median
microseconds of native and fused, measured in turns, and native / fused; "copy", the share of the
fused time in which a copy would move the same tensors; fused's relative error against float64.
Native is the best of NCHW and channels_last and, for forward and all passes, torch.compile. On a
GPU these are the kernels' own times, by CUDA graphs; the last columns are those of Python's calls.
Then training steps of ResNet-20, if common.py is there. Writes --out: benchmark.json, .png.
"""
import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402

LAYERS = ["16,16,32", "16,32,16", "32,32,16", "32,64,8", "64,64,8"]
MODES = ("none", "maxpool")  # a stride is native in both
STEP_CONFIGS = ((4, 3, 3), (1, 1, 8), (7, 1, 2))
PASSES = ("forward", "grad_input", "grad_weight", "all")
IN_A_GRAPH = 20  # calls


class Clock:
    """Times a call in microseconds. On a GPU all runs on one stream, which can be captured."""
    def __init__(self, device: str):
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            torch.cuda.set_stream(torch.cuda.Stream(device))
            self.cold = torch.zeros(64 << 20, device=device)

    def __call__(self, call) -> float:
        if self.cuda:
            self.flush()
            return self.by_events(call)
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)

    def flush(self) -> None:
        """Empty the L2 by reading. Writing would leave lines that the next kernel has to store."""
        self.cold.sum()

    def by_events(self, call) -> float:
        first, last = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        first.record()
        call()
        last.record()
        last.synchronize()
        return 1e3 * first.elapsed_time(last)

    def graph(self, calls: list):
        """Calls that have run before as one call, which replays their kernels."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for call in calls:
                call()
        return graph.replay


def in_turns(clock, calls: dict, repeats: int) -> dict[str, list[float]]:
    """Quartiles of each call's microseconds, measured in turns after three rounds to warm up."""
    times = {name: [] for name in calls}
    for call in 3 * list(calls.values()):  # torch.compile has its graphs after the second
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(clock(call))
    return {name: np.percentile(values, [25, 50, 75]).tolist() for name, values in times.items()}


def kernel_times(clock: Clock, calls: dict, repeats: int) -> dict[str, list[float]]:
    """As `in_turns`, of the kernels alone and the gaps between them: what a graph of flushes and
    calls takes longer than one of flushes."""
    graphs = {name: clock.graph([clock.flush, call] * IN_A_GRAPH) for name, call in calls.items()}
    graphs["flush"] = clock.graph([clock.flush] * IN_A_GRAPH)
    times = in_turns(clock.by_events, graphs, repeats)
    flush = times.pop("flush")[1]
    return {name: [(value - flush) / IN_A_GRAPH for value in times[name]] for name in calls}


def compared(times: dict[str, list[float]]) -> dict:
    """The quartiles of the fastest native way beside the fused ones."""
    fused = times.pop("fused")
    best = min(times, key=lambda way: times[way][1])
    return {"native": best, "native_us": times[best], "fused_us": fused,
            "ratio": times[best][1] / fused[1]}


def make_calls(pool_conv, x: torch.Tensor, weight: torch.Tensor, grad_y: torch.Tensor,
               downsample: str, single_gradients: bool = True) -> dict:
    """Each pass as a call that returns y or gradients first; what single ones need is run here."""
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    calls = {"forward": lambda: pool_conv(x, weight, downsample),
             "all": lambda: torch.autograd.grad(pool_conv(*leaves, downsample)[0], leaves, grad_y)}
    if single_gradients:
        for_x, _ = pool_conv(leaves[0], weight, downsample)
        for_weight, _ = pool_conv(x, leaves[1], downsample)
        calls["grad_input"] = lambda: torch.autograd.grad(for_x, leaves[0], grad_y, True)
        calls["grad_weight"] = lambda: torch.autograd.grad(for_weight, leaves[1], grad_y, True)
    return calls


def measure_layer(clock: Clock, args, copy_rate: float, layer: str, downsample: str) -> dict:
    """copy_rate: bytes that a copy reads and writes in a microsecond."""
    c_in, c_out, size = map(int, layer.split(","))
    dtype = torch.float32 if args.dtype == "tf32" else getattr(torch, args.dtype)
    x_size = 2 * size if downsample == "maxpool" else size
    x = torch.randn(args.batch, c_in, x_size, x_size, device=args.device).relu().to(dtype)
    weight = torch.randn(c_out, c_in, 3, 3, device=args.device).div((9 * c_in) ** 0.5).to(dtype)
    grad_y = torch.randn(args.batch, c_out, size, size, device=args.device).to(dtype)
    nchw = (x, weight, grad_y)
    nhwc = [tensor.to(memory_format=torch.channels_last) for tensor in nchw]
    fused_weight = nhwc[1] if clock.cuda else weight  # as the kernels read it, without a copy
    ways = {"nchw": make_calls(kernels.native_pool_conv2d, *nchw, downsample),
            "channels_last": make_calls(kernels.native_pool_conv2d, *nhwc, downsample),
            "fused": make_calls(kernels.pool_conv2d, nhwc[0], fused_weight, nhwc[2], downsample)}
    exact = make_calls(kernels.native_pool_conv2d, *[t.double() for t in nchw], downsample)
    error = {}
    for name in PASSES:
        truth = exact[name]()[0]
        error[name] = ((ways["fused"][name]()[0] - truth).norm() / truth.norm()).item()
    if args.compile:  # not the single gradients: each would compile for seconds
        torch._dynamo.reset()
        compiled = torch.compile(kernels.native_pool_conv2d, dynamic=False)
        ways["compiled"] = make_calls(compiled, *nhwc, downsample, single_gradients=False)
    pooled = x.nbytes // 4 if downsample == "maxpool" else 0
    moved = {"forward": x.nbytes + pooled + grad_y.nbytes, "grad_input": x.nbytes + grad_y.nbytes,
             "grad_weight": (pooled or x.nbytes) + grad_y.nbytes}
    moved["all"] = sum(moved.values()) - grad_y.nbytes  # both gradients may read it at once
    passes = {}
    for name in PASSES:
        calls = {way: calls[name] for way, calls in ways.items() if name in calls}
        called = compared(in_turns(clock, calls, args.repeats))
        of_kernels = compared(kernel_times(clock, calls, args.repeats)) if clock.cuda else called
        share = moved[name] / copy_rate / of_kernels["fused_us"][1]
        passes[name] = of_kernels | {"of_copy": share, "called": called}
    return {"layer": layer, "downsample": downsample, "passes": passes, "error": error}


def measure_step(clock: Clock, args, config: tuple[int, ...]) -> dict:
    """A training step of ResNet-20 at 32x32; on a GPU also as a graph and by torch.compile."""
    import common
    common.keep_freed_memory()
    network = common.ResNet("resnet20", 10, supernet=True)
    network.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(args.batch, 3, 32, 32, device=args.device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (args.batch,), device=args.device)

    def step(kernel: str, network=network) -> None:
        common.use_kernel(kernel)
        F.cross_entropy(network(images, config), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = {"native": lambda: step("native"), "fused": lambda: step("fused")}
    if clock.cuda:
        for name, call in list(calls.items()):
            call()
            calls[f"{name} graph"] = clock.graph([call])
        if args.compile:
            compiled = torch.compile(network, mode="reduce-overhead")
            calls["native compiled"] = lambda: step("native", compiled)
    times = in_turns(clock, calls, args.repeats)
    return {"config": common.config_name(config), "us": times,
            "ratio": times["native"][1] / times["fused"][1]}


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure
    axes = Figure(figsize=(13, 5), layout="constrained").subplots()
    for i, name in enumerate(PASSES):
        ratios = [row["passes"][name]["ratio"] for row in rows]
        axes.bar(np.arange(len(rows)) + 0.2 * (i - 1.5), ratios, 0.2, label=name)
    labels = [f"{row['layer']}\n{row['downsample']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=7)
    axes.axhline(1, color="k", linewidth=0.8)
    axes.set(ylabel="native / fused", xlabel="C_in,C_out,output size of a layer; what is before it")
    axes.legend(ncols=4)
    axes.figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    add("--dtype", default="tf32" if cuda else "float32",
        choices=["float32", "tf32", "float16", "bfloat16"],
        help="of layers; tf32: float32, on a GPU computed in TF32; a CPU fuses float32 only")
    add("--batch", type=int, default=128, help="images in a batch")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--layers", nargs="+", default=LAYERS, metavar="C_IN,C_OUT,SIZE", help="layer shapes")
    add("--repeats", type=int, default=5, help="measurements of each call")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="try torch.compile")
    add("--out", default="runs/benchmark", help="folder of the results")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    precision = "tf32" if args.dtype == "tf32" else "ieee"  # of native and of fused
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        kernels.load()
    except kernels.BuildError as error:
        sys.exit(f"error: {error}")
    clock = Clock(args.device)
    source, target = torch.zeros(2, 32 << 20, device=args.device)
    copying = in_turns(clock, {"copy": lambda: target.copy_(source)}, 5)
    copy_rate = 2 * source.nbytes / copying["copy"][1]
    name = torch.cuda.get_device_name() if clock.cuda else torch.backends.cpu.get_cpu_capability()
    print(f"{name}, {args.threads} threads, torch {torch.__version__}, {args.dtype}, batch "
          f"{args.batch}; a copy moves {copy_rate / 1e3:.0f} GB/s\n\nlayer       input    pass"
          "          native us   fused us  ratio   copy    error     called:  native    fused")
    rows = []
    for layer, mode in itertools.product(args.layers, MODES):
        row = measure_layer(clock, args, copy_rate, layer, mode)
        rows.append(row)
        for pass_name, result in row["passes"].items():
            print(f"{layer:12}{mode:9}{pass_name:12}{result['native_us'][1]:11.1f}"
                  f"{result['fused_us'][1]:11.1f}{result['ratio']:7.2f}{result['of_copy']:7.2f}"
                  f"{row['error'][pass_name]:9.1e}{result['called']['native_us'][1]:14.1f}"
                  f"{result['called']['fused_us'][1]:9.1f}", flush=True)

    steps = []
    if args.dtype in ("float32", "tf32") and (ROOT / "common.py").exists():
        for config in STEP_CONFIGS:
            step = measure_step(clock, args, config)
            steps.append(step)
            times = ", ".join(f"{way} {us[1] / 1e3:.1f} ms" for way, us in step["us"].items())
            print(f"training step {step['config']}: {times}; {step['ratio']:.2f}x", flush=True)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    plot(rows, folder / "benchmark.png")
    machine = {"command": " ".join(sys.argv), "name": name, "torch": torch.__version__,
               "times": "microseconds: 25 %, median, 75 %", "copy_bytes_per_us": copy_rate}
    (folder / "benchmark.json").write_text(
        json.dumps(machine | vars(args) | {"layers": rows, "steps": steps}, indent=1))
    print(f"written: {folder}/benchmark.json, {folder}/benchmark.png")


if __name__ == "__main__":
    main()
