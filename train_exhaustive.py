"""Stage 1: train pooling configurations on their own, from scratch: the ground truth of a search.

    python train_exhaustive.py --dataset cifar10 --epochs 200 --seeds 3    # all 36: days on a CPU
    python train_exhaustive.py --configs 4,3,3 7,1,2                       # a few, on digits
    torchrun --nproc-per-node=8 train_exhaustive.py --dataset cifar10      # a network a process

Writes runs/exhaustive-<dataset>/: config.json, networks/<config>-<seed>.pt (checkpoint, then the
trained weights) and .json (accuracy, history of its epochs), results.csv (a row a finished network,
written as rank 0 ends with a seed: what --ground-truth of the searches takes), result.json (best
first), ranking.png. The same command, also with more --seeds or other --configs, skips what is
finished and continues the rest. A network that diverges is named at the end.
Source: arXiv:2306.11982, section 4 (brute force).
"""
from __future__ import annotations

import math
import shlex
from pathlib import Path
from statistics import mean

import common
from common import config_name, rank, standard_deviation


def main(argv: list[str] | None = None) -> None:
    parser = common.make_parser(__doc__)
    common.add_training_flags(parser, seeds=1)
    parser.add_argument("--configs", nargs="+", metavar="N,N,N", help="only these configurations")
    args = common.parse_arguments(parser, argv, search=False)
    common.prepare_torch(args)

    train, test = data = common.load_dataset(args)
    space = common.search_space(args, train)
    folder, record = common.open_run("exhaustive", args, data)
    common.choose_kernel(args, folder, record, space, train)
    print(f"{len(space.configs)} configurations x {args.seeds} seeds x {args.epochs} epochs:",
          common.describe(args, train, test, folder), flush=True)

    # All configurations of the first seed come first: they are a ground truth already. Those of the
    # most multiply-adds begin, so that no rank has much more to do than another.
    by_macs = sorted(space.configs, key=space.macs.get, reverse=True)
    pairs = [(config, args.seed + i) for i in range(args.seeds) for config in by_macs]
    rows, diverged = common.train_networks(folder, args, train, test, pairs)
    if rank > 0:
        return
    if not rows:
        raise diverged

    accuracies = common.by_config(rows)
    means = {config: mean(values) for config, values in accuracies.items()}
    order = sorted(means, key=means.get, reverse=True)
    by_seed = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["config"]] = row["test_accuracy"]
    tau = common.mean_tau(list(by_seed.values()))
    between_configs = standard_deviation(list(means.values()))
    variances = [standard_deviation(values) ** 2 for values in accuracies.values()
                 if len(values) > 1]
    between_seeds = math.sqrt(mean(variances)) if variances else 0.0
    steps = args.epochs * train.num_batches(args.batch_size)
    ranking = [{"config": config_name(config), "test_accuracy": means[config],
                "std": standard_deviation(accuracies[config]), "seeds": len(accuracies[config]),
                "steps": [steps] * len(accuracies[config]), "macs": space.macs[config],
                "relative_macs": space.relative_macs(config)} for config in order]
    common.save(folder / "result.json", record | {
        "kendall_tau_between_seeds": tau, "std_between_configs": between_configs,
        "std_between_seeds": between_seeds, "ranking": ranking})
    common.plot_results(folder / "ranking.png", accuracies, "test accuracy", space,
                        f"{Path(args.dataset).name}, {args.arch}, every configuration alone")
    columns = {"config": "", "test_accuracy": ".4f", "std": ".4f", "seeds": "",
               "relative_macs": ".2f"}
    common.print_ranking(ranking, columns, config_name(space.default))
    print(f"\nbest {ranking[0]['config']}, best to worst {means[order[0]] - means[order[-1]]:.4f}; "
          f"standard deviation between configurations {between_configs:.4f}, between seeds "
          f"{between_seeds:.4f}" + ("" if tau is None else f"; Kendall tau of two seeds {tau:.3f}"))
    print("next: a search of the same data and network, with --ground-truth "
          + shlex.quote(f"{folder}/results.csv"))
    if diverged:
        raise diverged


if __name__ == "__main__":
    common.run_script(main)
