"""Stage 1: train pooling configurations on their own, from scratch: the ground truth of a search.

    python train_exhaustive.py --dataset cifar10 --epochs 200 --seeds 3    # all 36: days on a CPU
    python train_exhaustive.py --configs 4,3,3 7,1,2                       # a few, on digits
    torchrun --nproc-per-node=8 train_exhaustive.py --dataset cifar10      # a network a process

Writes runs/exhaustive-<dataset>/: config.json, results.csv (a row a finished network: config, seed,
test_accuracy, ...; what --ground-truth of the searches takes), log.jsonl (a line an epoch),
result.json (best first), ranking.png. The same command, also with more --seeds or other --configs,
skips what is finished and continues what was interrupted.
Source: arXiv:2306.11982, section 4 (brute force).
"""
from statistics import mean

from common import (Parser, ResNet20, Run, by_config, config_name, enumerate_configs, load_dataset,
                    number, parse_config, plot_results, rank, run_script, spread,
                    train_stand_alone)


def main() -> None:
    parser = Parser(__doc__, search=False)
    group = parser.add_argument_group("stage 1")
    group.add_argument("--configs", nargs="+", metavar="N,N,N",
                       help="train only these configurations; None: all 36")
    group.add_argument("--seeds", type=number(int, 1), default=1, metavar="N",
                       help="networks a configuration, seeds --seed, --seed + 1, ...")
    args = parser.parse_args()
    configs = ([parse_config(text) for text in args.configs] if args.configs else
               enumerate_configs(ResNet20.num_layers, len(ResNet20.default_config)))
    train, test = load_dataset(args)
    run = Run("exhaustive", args)
    print(f"{len(configs)} configurations x {args.seeds} seeds on {args.dataset}: {len(train)} "
          f"training and {len(test)} test images {train.images.shape[1]}x{train.images.shape[1]}, "
          f"{train.num_classes} classes, {args.epochs} epochs; {args.device}, {args.threads} "
          f"threads; writing to {run.folder}", flush=True)
    # seeds outside: the first pass over the configurations is already a ground truth
    rows = train_stand_alone(run, args, train, test, [
        (config, args.seed + i) for i in range(args.seeds) for config in configs])
    if rank:
        return  # rank 0 reports

    values = by_config(rows)
    means = {name: mean(found) for name, found in values.items()}
    order = sorted(means, key=means.get, reverse=True)
    run.save("result.json", {"ranking": [
        {"config": name, "test_accuracy": means[name], "std": spread(values[name]),
         "seeds": len(values[name])} for name in order]})
    plot_results(run.folder / "ranking.png", values, "test accuracy")
    default = config_name(ResNet20.default_config)
    print(f"\n{'rank':>4}  {'configuration':13}  {'test accuracy':>13}  {'std':>6}  seeds")
    for place, name in enumerate(order, 1):
        if place <= 10 or place == len(order) or name == default:
            print(f"{place:4}  {name:13}  {means[name]:13.4f}  {spread(values[name]):6.4f}  "
                  f"{len(values[name]):5}" + ("  default" if name == default else ""))
    print(f"\nbest {order[0]}; best to worst {means[order[0]] - means[order[-1]]:.4f}, mean std "
          f"between seeds {mean(map(spread, values.values())):.4f}")
    print(f"next: python search_mixture.py --dataset {args.dataset} "
          f"--ground-truth {run.folder}/results.csv")


if __name__ == "__main__":
    run_script(main)
