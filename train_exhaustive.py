"""Stage 1: train pooling configurations on their own, from scratch: the ground truth of a search.

    python train_exhaustive.py --dataset cifar10 --epochs 200 --seeds 3    # all 36: days on a CPU
    python train_exhaustive.py --configs 4,3,3 7,1,2                       # a few, on digits
    torchrun --nproc-per-node=8 train_exhaustive.py --dataset cifar10      # a network a process

Writes runs/exhaustive-<dataset>/: config.json, networks/<config>-<seed>.pt (checkpoint, then the
trained weights) and .json (accuracy, history of its epochs), results.csv (a row a finished network:
what --ground-truth of the searches takes), result.json (best first), ranking.png. The same command,
also with more --seeds or other --configs, skips what is finished and continues the rest.
Source: arXiv:2306.11982, section 4 (brute force).
"""
from __future__ import annotations

import math
import shlex
from statistics import mean

import common
from common import Run, config_name, rank, spread, world


def main(argv: list[str] | None = None) -> None:
    parser = common.make_parser(__doc__, search=False)
    common.add_space(parser.add_argument)
    args = common.fill_defaults(parser.parse_args(argv), search=False)
    common.prepare_torch(args)

    train, test = data = common.load_dataset(args)
    space = common.search_space(args, train)
    run = Run("exhaustive", args, data, space, extensible={"configs", "max_macs"})
    print(f"{len(space.configs)} configurations x {args.seeds} seeds x {args.epochs} epochs:",
          common.describe(args, train, test, run.folder), flush=True)

    # seeds outside: the first pass over the configurations is already a ground truth. The dearest
    # first, dealt in turn: no two ranks train the same network, and none has much more to do.
    by_cost = sorted(space.configs, key=space.macs.get, reverse=True)
    pairs = [(config, args.seed + i) for i in range(args.seeds) for config in by_cost]
    common.train_pairs(run.folder, args, train, test, pairs[rank::world])
    if rank > 0:
        return

    rows = common.collect_results(run.folder)
    accuracies = common.by_config(rows)
    means = {config: mean(values) for config, values in accuracies.items()}
    order = sorted(means, key=means.get, reverse=True)
    by_seed = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["config"]] = row["test_accuracy"]
    tau = common.mean_tau(list(by_seed.values()))
    between_configs = spread(list(means.values()))
    variances = [spread(values) ** 2 for values in accuracies.values() if len(values) > 1]
    between_seeds = math.sqrt(mean(variances)) if variances else 0.0
    steps = args.epochs * train.num_batches(args.batch_size)
    ranking = [{"config": config_name(config), "test_accuracy": means[config],
                "std": spread(accuracies[config]), "seeds": len(accuracies[config]),
                "steps": [steps] * len(accuracies[config]), "macs": space.macs[config],
                "cost": space.cost(config)} for config in order]
    common.save(run.folder / "result.json", run.record | {
        "kendall_tau_between_seeds": tau, "std_between_configs": between_configs,
        "std_between_seeds": between_seeds, "ranking": ranking})
    common.plot_results(run.folder / "ranking.png", accuracies, "test accuracy", space)

    print("\nrank  configuration  test accuracy     std  seeds  cost (multiply-adds)")
    for place, entry in enumerate(ranking, 1):
        default = entry["config"] == config_name(space.default)
        if place <= 10 or place == len(ranking) or default:
            print(f"{place:4}  {entry['config']:13}  {entry['test_accuracy']:13.4f}  "
                  f"{entry['std']:6.4f}  {entry['seeds']:5}  {entry['cost']:4.2f}"
                  + "  default" * default)
    print(f"\nbest {ranking[0]['config']}, best to worst {means[order[0]] - means[order[-1]]:.4f}; "
          f"standard deviation between configurations {between_configs:.4f}, between seeds "
          f"{between_seeds:.4f}" + ("" if tau is None else f"; Kendall tau of two seeds {tau:.3f}"))
    print("next: a search of the same data and network, with --ground-truth "
          + shlex.quote(f"{run.folder}/results.csv"))


if __name__ == "__main__":
    common.run_script(main)
