"""Benchmark: the fused kernels against native operators, layer by layer, in a step, in the search.

    python kernels/benchmark.py                              # float32 on this machine's CPU or GPU
    python kernels/benchmark.py --layers 16,16,32 --batch 64
    python kernels/benchmark.py --loop                       # the main job's loop, on a CPU

For each layer (C_in,C_out,output size) of ResNet-20 and each way to downsample: the median time of
native and fused, measured in turns, and native / fused; effective GFLOP/s (of the direct
convolution's operations); the shares of this machine's matrix product (all passes) and copy
bandwidth (forward: x and y once); the error against float64.
Native is the best of NCHW and channels_last, eager and torch.compile (--no-compile: eager). Then
the whole training step with both (needs common.py beside the folder). Writes --out: benchmark.json
and benchmark.png.

--loop times the loop of search_mixture.py (M = 4, ResNet-20, 32x32) against itself with native
operators and against the plain recipe, what most people would write: PIL images and torchvision's
transforms in a DataLoader, NCHW, F.max_pool2d and nn.Conv2d, a separate pass for each configuration
in the final evaluation. Each in a process of its own, since the memory allocator is part of it, on
random images, on the same draws of (configuration, supernet), in turns of five steps. "default
malloc" is native without what common.keep_freed_memory does. Writes --out: loop.json.
"""
import argparse
import functools
import json
import multiprocessing
import os
import platform
import resource
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
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)


def interleaved(clock, calls: dict, repeats: int) -> dict[str, np.ndarray]:
    """Quartiles (3,) of each call's milliseconds, called in turns, after two rounds to warm up;
    clock(call) makes a call and gives its milliseconds."""
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
    network = common.ResNet("resnet20", 10, supernet=True).to(
        args.device, memory_format=torch.channels_last)
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
    a, b, product = torch.randn(3, 2048, 2048, device=args.device).to(dtype)
    big = torch.empty(64 << 20, device=args.device)
    other = torch.empty_like(big)
    found = interleaved(clock, {"mm": lambda: torch.mm(a, b, out=product),
                                "copy": lambda: other.copy_(big)}, 7)
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


# ----------------------------------------------------------------------------------------- --loop

STEPS, TURN, SUPERNETS, HALF, EVALUATED = 40, 5, 4, 25000, 4  # the last: batches


def random_images(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return (rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count))


class OurLoop:
    """What search_mixture.py does between two lines of its log."""

    def __init__(self, who: str, batch: int):
        import common
        import search_mixture
        self.common, self.search = common, search_mixture
        common.choose_kernel("fused" if who == "fused" else "native", "cpu")
        if who != "native, default malloc":
            common.keep_freed_memory()
        args = argparse.Namespace(device="cpu", amp="off", momentum=0.9, weight_decay=0.0)
        self.batches = []
        for crops in (common.stream(1), None):
            images, labels = random_images(HALF)
            self.images = common.Images(torch.from_numpy(images), torch.from_numpy(labels),
                                        torch.full((3,), 120.0), torch.full((3,), 60.0), 10, True)
            self.batches.append(self.images.passes(batch, common.stream(0), crops))
        self.learners = [common.Learner(common.ResNet("resnet20", 10, supernet=True).to(
            memory_format=torch.channels_last), args) for _ in range(SUPERNETS)]
        self.networks, self.batch = [learner.network for learner in self.learners], batch
        self.configs = common.enumerate_configs(10, 3)
        self.macs, _ = common.count_macs(self.networks[0], self.configs, 32)
        self.scores = torch.ones(len(self.configs), SUPERNETS, dtype=torch.float64)
        self.args, self.taken = argparse.Namespace(balance=True, tolerance=1e-4), 0

    def step(self, c: int, m: int) -> dict:
        """A training and a validation step; seconds in the network, multiply-adds."""
        learner, config = self.learners[m], self.configs[c]
        if self.taken % (self.search.INTERVAL * SUPERNETS) == 0:
            self.search.assign(self.scores, 50.0, self.args)
        self.taken += 1
        (training, checking), seconds = self.batches, 0.0
        for batches, use in ((training, lambda *batch: learner.step(*batch, 0.01)),
                             (checking, learner.check)):
            images, labels = next(batches)
            start = time.perf_counter()
            numbers = use(images, labels, config)
            seconds += time.perf_counter() - start
        self.search.update_score(self.scores, c, m, numbers, 0.9)
        return {"network": seconds, "macs": 4 * self.batch * self.macs[c]}

    def probe(self) -> float:
        return self.common.Gauge("cpu").rate

    def train(self, config) -> None:
        batch = self.images.batch(torch.arange(self.batch))
        self.learners[0].step(*batch, config, 0.01)

    def evaluate(self, owners: list[int]) -> None:
        assignment = F.one_hot(torch.tensor(owners), SUPERNETS)
        images = self.images.subset(torch.arange(EVALUATED * self.batch))
        self.search.evaluate_owned(dict(enumerate(self.learners)), assignment, self.configs,
                                   images, self.batch)


class PlainImages(torch.utils.data.Dataset):
    """As torchvision.datasets.CIFAR10: a PIL image, transformed, and its label."""

    def __init__(self, count: int, transform):
        self.data, self.targets = random_images(count)
        self.transform = transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        from PIL import Image
        return self.transform(Image.fromarray(self.data[index])), int(self.targets[index])


class PlainLoop:
    """The plain recipe."""

    def __init__(self, who: str, batch: int):
        import common
        from torchvision import transforms
        normal = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
        crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        workers = int(who.split()[1])

        def loader(count, transform, shuffle):
            return torch.utils.data.DataLoader(
                PlainImages(count, transforms.Compose(transform)), batch, shuffle=shuffle,
                num_workers=workers, persistent_workers=workers > 0)
        self.train_batches = iter(loader(HALF, crop + normal, True))
        self.check_batches = iter(loader(HALF, normal, True))
        self.evaluation = loader(EVALUATED * batch, normal, False)
        self.networks = [common.ResNet("resnet20", 10, supernet=True) for _ in range(SUPERNETS)]
        self.optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
                           for net in self.networks]
        self.configs = common.enumerate_configs(10, 3)

    def step(self, c: int, m: int) -> None:
        network, optimizer, config = self.networks[m], self.optimizers[m], self.configs[c]
        images, labels = next(self.train_batches)
        optimizer.zero_grad()
        logits = network(images, config)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        loss.item(), (logits.argmax(1) == labels).float().mean().item()
        images, labels = next(self.check_batches)
        with torch.no_grad():
            (network(images, config).argmax(1) == labels).float().mean().item()

    def evaluate(self, owners: list[int]) -> None:
        with torch.no_grad():
            for config, m in zip(self.configs, owners):
                for images, labels in self.evaluation:
                    (self.networks[m](images, config).argmax(1) == labels).sum().item()


def serve(pipe, who: str, threads: int, batch: int) -> None:
    """A process of `--loop`: (method, arguments) -> (seconds, page faults, result, peak bytes)."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    loop = (PlainLoop if who.startswith("plain") else OurLoop)(who, batch)
    while command := pipe.recv():
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        result = getattr(loop, command[0])(*command[1:])
        seconds, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        pipe.send((seconds, usage.ru_minflt - faults, result, 1024 * usage.ru_maxrss))


def measure_loop(args) -> dict:
    """Everything of loop.json but the machine."""
    context, ask = multiprocessing.get_context("spawn"), {}
    names = ("fused", "native", "native, default malloc", "plain 0 workers", "plain 2 workers")
    for who in names:
        here, there = context.Pipe()
        context.Process(target=serve, args=(there, who, args.threads, args.batch),
                        daemon="plain" not in who).start()

        def call(*command, pipe=here):
            pipe.send(command)
            return pipe.recv() if command else None
        ask[who] = call
    rng = np.random.default_rng(0)
    draws = [(int(rng.integers(36)), i % SUPERNETS) for i in range(STEPS)]
    owners = {"M = 4": rng.integers(SUPERNETS, size=36).tolist(), "M = 1": [0] * 36}
    found = {who: {"steps": [], "faults": 0, "network": 0.0, "macs": 0.0} for who in names}
    loops = [who for who in names if "malloc" not in who]
    for who in tqdm(loops, "warming up", disable=None, leave=False):
        for draw in draws[:4]:
            ask[who]("step", *draw)
    for turn in tqdm(range(0, STEPS, TURN), "steps", disable=None, leave=False):
        for who in loops:
            for draw in draws[turn:turn + TURN]:
                seconds, faults, result, _ = ask[who]("step", *draw)
                found[who]["steps"].append(1e3 * seconds)
                found[who]["faults"] += faults
                for key, value in (result or {}).items():
                    found[who][key] += value
    for name, owner in owners.items():
        for who in tqdm(loops, f"evaluation, {name}", disable=None, leave=False):
            seconds = min(ask[who]("evaluate", owner)[0] for _ in range(min(2, args.repeats)))
            found[who][f"evaluation_minutes, {name}"] = (
                seconds * HALF / (EVALUATED * args.batch) / 60)
    rate = ask["fused"]("probe")[2]
    result = {"training_step_ms": {}, "loop": {}, "probe_gflops": 2e-9 * rate}
    for config in STEP_CONFIGS:
        calls = {who: functools.partial(ask[who], "train", config) for who in names[:3]}
        times = interleaved(lambda call: 1e3 * call()[0], calls, args.repeats)
        result["training_step_ms"][",".join(map(str, config))] = {
            who: found_ms.tolist() for who, found_ms in times.items()}
    for who in loops:
        steps, epoch = found[who].pop("steps"), HALF / args.batch
        result["loop"][who] = found[who] | {
            "step_ms": np.percentile(steps, [25, 50, 75]).tolist(), "mean_ms": np.mean(steps),
            "seconds_per_epoch": np.mean(steps) / 1e3 * epoch,
            "hours_per_100_epochs": np.mean(steps) / 1e3 * epoch / 36,
            "outside_the_network": 1 - 1e3 * found[who]["network"] / sum(steps),
            "utilisation": 1e3 * found[who]["macs"] / sum(steps) / rate,
            "faults_per_step": found[who].pop("faults") / STEPS,
            "peak_gb": ask[who]("step", *draws[0])[3] / 1e9}
    for who in names:
        ask[who]()
    return result


def print_loop(result: dict) -> None:
    loop, fused = result["loop"], result["loop"]["fused"]
    print(f"\n{'loop':16}  ms a step: 25 %, median, 75 %  s/epoch  h/100 epochs  mean / fused")
    for who, row in loop.items():
        low, middle, high = row["step_ms"]
        print(f"{who:16}{low:17.0f} {middle:7.0f} {high:5.0f}{row['seconds_per_epoch']:9.0f}"
              f"{row['hours_per_100_epochs']:14.2f}{row['mean_ms'] / fused['mean_ms']:13.2f}x")
    print(f"\n{'final evaluation':16}  minutes: M = 4   M = 1    / fused  / fused   peak GB  "
          "page faults a step of the loop")
    for who, row in loop.items():
        keys = [f"evaluation_minutes, M = {m}" for m in (4, 1)]
        print(f"{who:16}{row[keys[0]]:16.1f}{row[keys[1]]:8.1f}"
              + "".join(f"{row[key] / fused[key]:9.2f}x" for key in keys)
              + f"{row['peak_gb']:9.2f}{row['faults_per_step']:15.0f}")
    print(f"\n{'training step':16}{'fused':>10}{'native':>21}{'native, default malloc':>26}")
    for config, row in result["training_step_ms"].items():
        print(f"{config:16}" + "".join(
            f"{times[1]:10.0f} ms {times[1] / row['fused'][1]:.2f}x   " for times in row.values()))
    for who in ("fused", "native"):
        print(f"{who}: utilisation {loop[who]['utilisation']:.2f} direct-convolution equivalents, "
              f"{100 * loop[who]['outside_the_network']:.1f} % of the loop outside the network")


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
    add("--loop", action="store_true", help="time the main job's loop instead, about 5 minutes")
    add("--out", default="runs/benchmark", help="folder for benchmark.json and .png, or loop.json")
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
          f"{rates['copy_gbs']:.0f} GB/s")
    machine = {"command": " ".join(sys.argv), "device": name, "threads": args.threads,
               "torch": torch.__version__, "dtype": args.dtype, "batch": args.batch, "rates": rates,
               "times": "milliseconds: 25 %, median, 75 %"}
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    if args.loop:
        result = measure_loop(args)
        print_loop(result)
        (folder / "loop.json").write_text(json.dumps(machine | result, indent=1))
        return print(f"written: {folder}/loop.json")
    print(f"\nnative / fused{'':13}" + "".join(f"{name:>12}" for name in PASSES)
          + "   of product   of copy   error y, x, weight")
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
        for config in STEP_CONFIGS:
            steps.append(measure_step(clock, args, config))
            print("training step {config:10} native {0:7.1f} ms  fused {1:7.1f} ms  {ratio:.2f}x"
                  .format(steps[-1]["native_ms"][1], steps[-1]["fused_ms"][1], **steps[-1]))
    plot(rows, steps, folder / "benchmark.png")
    (folder / "benchmark.json").write_text(
        json.dumps(machine | {"layers": rows, "steps": steps}, indent=1))
    print(f"written: {folder}/benchmark.json, {folder}/benchmark.png")


if __name__ == "__main__":
    main()
