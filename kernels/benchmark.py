"""Benchmark: the fused kernels against native operators, by layers and in whole training steps.

    python kernels/benchmark.py         # float32 on this machine's CPU or GPU, within 3 minutes

For each layer (C_in,C_out,output size), alone and behind a max-pool: the median times of native and
fused, measured in turns, as native / fused; the share of this machine's matrix product that fused
reaches in all passes, counting the direct convolution's operations (Winograd does fewer, and may
exceed 1); the error against float64. Native is the best of NCHW and channels_last and, for forward
and all passes, torch.compile. Then whole training steps of ResNet-20 at 32x32, if common.py is
beside the folder. Writes --out: benchmark.json and benchmark.png.
"""
import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402

LAYERS = ["16,16,32", "16,32,16", "32,32,16", "32,64,8", "64,64,8"]
MODES = ("none", "maxpool")  # a stride is native in both
STEP_CONFIGS = ((4, 3, 3), (1, 1, 8), (7, 1, 2))
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
        first = torch.cuda.Event(enable_timing=True)
        last = torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)


def in_turns(clock: Clock, calls: dict, repeats: int) -> dict[str, list[float]]:
    """Quartiles of each call's milliseconds, measured in turns after a round to warm up."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(clock(call))
    return {name: np.percentile(values, [25, 50, 75]).tolist() for name, values in times.items()}


def compared(times: dict[str, list[float]]) -> dict:
    """The quartiles of the fastest native way beside the fused ones."""
    fused = times.pop("fused")
    best = min(times, key=lambda way: times[way][1])
    return {"native": best, "native_ms": times[best], "fused_ms": fused,
            "ratio": times[best][1] / fused[1]}


def matrix_product_gflops(clock: Clock, device: str, dtype: torch.dtype) -> float:
    a, b, product = torch.randn(3, 2048, 2048, device=device).to(dtype)
    times = in_turns(clock, {"mm": lambda: torch.mm(a, b, out=product)}, 5)
    return 2 * 2048 ** 3 / times["mm"][1] / 1e6


def make_calls(pool_conv, x: torch.Tensor, weight: torch.Tensor, downsample: str) -> dict:
    """Each pass as a call without arguments; the gradients' forward passes are made once, here."""
    x_grad = x.detach().requires_grad_()
    weight_grad = weight.detach().requires_grad_()
    y_of_x, _ = pool_conv(x_grad, weight, downsample)
    y_of_weight, _ = pool_conv(x, weight_grad, downsample)
    gradient = torch.randn_like(y_of_x)

    def all_passes():
        y, _ = pool_conv(x_grad, weight_grad, downsample)
        return torch.autograd.grad(y, (x_grad, weight_grad), gradient)

    return {
        "forward": lambda: pool_conv(x, weight, downsample),
        "grad_input": lambda: torch.autograd.grad(y_of_x, x_grad, gradient, retain_graph=True),
        "grad_weight": lambda: torch.autograd.grad(y_of_weight, weight_grad, gradient,
                                                   retain_graph=True),
        "all": all_passes}


def make_compiled_calls(x: torch.Tensor, weight: torch.Tensor, downsample: str) -> dict:
    """As `make_calls`, but not the gradients alone: each would compile for seconds."""
    torch._dynamo.reset()
    compiled = torch.compile(kernels.native_pool_conv2d, dynamic=False)
    inputs = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    gradient = torch.randn_like(compiled(*inputs, downsample)[0])
    return {"forward": lambda: compiled(x, weight, downsample),
            "all": lambda: torch.autograd.grad(compiled(*inputs, downsample)[0], inputs, gradient)}


def errors(x: torch.Tensor, weight: torch.Tensor, downsample: str) -> dict[str, float]:
    """Relative Frobenius errors of fused against float64 on four images."""
    inputs = [x[:4].detach().requires_grad_(), weight.detach().requires_grad_()]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y, _ = kernels.pool_conv2d(*inputs, downsample)
    exact, _ = kernels.native_pool_conv2d(*exact_inputs, downsample)
    gradient = torch.randn_like(y)

    results = [y, *torch.autograd.grad(y, inputs, gradient)]
    truth = [exact, *torch.autograd.grad(exact, exact_inputs, gradient.double())]
    return {name: ((a.double() - b).norm() / b.norm()).item()
            for name, a, b in zip(PASSES, results, truth)}


def measure_layer(clock: Clock, args: argparse.Namespace, layer: str, downsample: str) -> dict:
    c_in, c_out, size = map(int, layer.split(","))
    dtype = getattr(torch, args.dtype)
    x_size = 2 * size if downsample == "maxpool" else size
    x = torch.randn(args.batch, c_in, x_size, x_size, device=args.device).relu().to(dtype)
    weight = torch.randn(c_out, c_in, 3, 3, device=args.device).div((9 * c_in) ** 0.5).to(dtype)
    x_last = x.to(memory_format=torch.channels_last)
    weight_last = weight.to(memory_format=torch.channels_last)

    native = kernels.native_pool_conv2d
    ways = {"nchw": make_calls(native, x, weight, downsample),
            "channels_last": make_calls(native, x_last, weight_last, downsample),
            "fused": make_calls(kernels.pool_conv2d, x_last, weight, downsample)}
    if args.compile:
        ways["compiled"] = make_compiled_calls(x_last, weight, downsample)
    passes = {}
    for name in PASSES:
        calls = {way: calls[name] for way, calls in ways.items() if name in calls}
        passes[name] = compared(in_turns(clock, calls, args.repeats))

    operations = 3 * 2 * 9 * args.batch * size ** 2 * c_in * c_out
    return {"layer": layer, "downsample": downsample, "passes": passes,
            "fused_gflops": operations / passes["all"]["fused_ms"][1] / 1e6,
            "error": errors(x_last, weight, downsample)}


def measure_step(clock: Clock, args: argparse.Namespace, config: tuple[int, ...]) -> dict:
    """A training step of ResNet-20 with SGD, with the memory settings that the scripts use."""
    import common
    common.keep_freed_memory()
    network = common.ResNet("resnet20", 10, supernet=True)
    network.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(args.batch, 3, 32, 32, device=args.device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (args.batch,), device=args.device)

    def step(kernel: str) -> None:
        common.use_kernel(kernel)
        F.cross_entropy(network(images, config), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = {"native": lambda: step("native"), "fused": lambda: step("fused")}
    times = in_turns(clock, calls, args.repeats)
    return {"config": common.config_name(config)} | compared(times)


def plot(rows: list[dict], steps: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(PASSES):
        ratios = [row["passes"][name]["ratio"] for row in rows]
        axes.bar(np.arange(len(rows)) + 0.2 * (i - 1.5), ratios, 0.2, label=name)
    axes.bar(np.arange(len(steps)) + len(rows), [step["ratio"] for step in steps], 0.6,
             label="training step", color="0.4")

    labels = [f"{row['layer']}\n{row['downsample']}" for row in rows]
    labels += [step["config"] for step in steps]
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.axhline(1, color="k", linewidth=0.8)
    axes.set(ylabel="native / fused", xlabel="C_in,C_out,output size; configuration of a step")
    axes.legend(ncols=5)
    figure.savefig(path, dpi=110)


def device_name(device: str) -> str:
    if "cuda" in device:
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", default="float32", choices=["float32", "float16", "bfloat16"],
        help="of layers; on a CPU only float32 has fused kernels")
    add("--batch", type=int, default=128, help="images in a batch")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--layers", nargs="+", default=LAYERS, metavar="C_IN,C_OUT,SIZE", help="layer shapes")
    add("--repeats", type=int, default=5, help="measurements of each call")
    add("--no-compile", dest="compile", action="store_false",
        help="try native operators without torch.compile only")
    add("--out", default="runs/benchmark", help="folder of the results")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        kernels.load()
    except kernels.BuildError as error:
        sys.exit(f"error: {error}")

    clock = Clock(args.device)
    product = matrix_product_gflops(clock, args.device, getattr(torch, args.dtype))
    machine = {"command": " ".join(sys.argv), "name": device_name(args.device),
               "torch": torch.__version__, "times": "milliseconds: 25 %, median, 75 %",
               "matrix_product_gflops": product} | vars(args)
    print("{name}, {threads} threads, torch {torch}, {dtype}, batch {batch}; matrix product "
          "{matrix_product_gflops:.0f} GFLOP/s\n".format_map(machine))
    print(f"{'native / fused':25}" + "".join(f"{name:>12}" for name in PASSES)
          + "  of product  error: forward, grad_input, grad_weight")
    rows = []
    todo = [(layer, mode) for layer in args.layers for mode in MODES]
    for layer, mode in tqdm(todo, disable=None, leave=False):
        row = measure_layer(clock, args, layer, mode)
        rows.append(row)
        ratios = "".join(f"{row['passes'][name]['ratio']:12.2f}" for name in PASSES)
        error = " ".join(f"{value:.1e}" for value in row["error"].values())
        tqdm.write(f"{layer:>12} {mode:<12}{ratios}{row['fused_gflops'] / product:12.2f}  {error}")

    steps = []
    if args.dtype == "float32" and (ROOT / "common.py").exists():
        for config in tqdm(STEP_CONFIGS, "training steps", disable=None, leave=False):
            step = measure_step(clock, args, config)
            steps.append(step)
            tqdm.write(f"training step {step['config']:8} native {step['native_ms'][1]:6.1f} ms, "
                       f"fused {step['fused_ms'][1]:6.1f} ms, {step['ratio']:.2f}x")

    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    plot(rows, steps, folder / "benchmark.png")
    (folder / "benchmark.json").write_text(
        json.dumps(machine | {"layers": rows, "steps": steps}, indent=1))
    print(f"written: {folder}/benchmark.json, {folder}/benchmark.png")


if __name__ == "__main__":
    main()
