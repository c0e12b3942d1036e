"""Stage 3: train a found configuration from scratch, beside the default, on all training images.

    python retrain.py --from runs/mixture-cifar10    # the pick of a search
    python retrain.py --config 5,3,2 --dataset cifar10 --seeds 3
    torchrun --nproc-per-node=6 retrain.py --from runs/mixture-cifar10

--from takes the settings of the data and the network over from the search, unless given here.
Writes runs/retrain-<dataset>/: config.json, results.csv (a row a finished network), log.jsonl (a
line an epoch), result.json (mean and standard deviation of the test accuracy, gap to the default
with a paired t-test over the seeds, cost of both), checkpoints meanwhile. The same command
continues a stopped run.
Source: arXiv:2306.11982, section 4 (retraining).
"""
from pathlib import Path
from statistics import mean

from common import (Parser, Run, by_config, config_name, load_dataset, number, parse_config, rank,
                    read_search, run_script, search_space, spread, world)
from train_exhaustive import train_stand_alone


def arguments():
    parser = Parser(__doc__, search=False, configs=False)
    group = parser.add_argument_group("stage 3")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--from", dest="source", metavar="RUN", help="run folder of a search")
    source.add_argument("--config", metavar="N,N,N", help="the configuration, e.g. 5,3,2")
    group.add_argument("--seeds", type=number(int, 1, 1000), default=3, metavar="N",
                       help="networks a configuration, seeds --seed, --seed + 1, ...")
    args = parser.parse_args()
    if args.source:
        result = read_search(Path(args.source))
        parser.set_defaults(**{key: result["settings"][key] for key in (
            "dataset", "data_dir", "image_size", "num_train", "arch", "num_resolutions",
            "downsample", "width")})
        args = parser.parse_args()
        args.config = result["pick"]
    return args


def compare(found: list[float], default: list[float]) -> tuple[float, list | None, float | None]:
    """Mean difference of two lists paired by seed; its 95 % interval and p by Student's paired
    t-test, None where the differences have no spread. The same seed means the same order of
    images and the same crops."""
    from scipy.stats import ttest_rel
    differences = [a - b for a, b in zip(found, default)]
    if spread(differences) < 1e-12:
        return mean(differences), None, None
    test = ttest_rel(found, default)
    return mean(differences), list(test.confidence_interval()), float(test.pvalue)


def main() -> None:
    args = arguments()
    train, test = data = load_dataset(args)
    space = search_space(args, train, supernet=False)
    found = parse_config(args.config, space.default)
    configs = list(dict.fromkeys([found, space.default]))
    run = Run("retrain", args, data)
    print(f"{args.arch}, {' and '.join(map(config_name, configs))} x {args.seeds} seeds on "
          f"{args.dataset}: {len(train)} training and {len(test)} test images "
          f"{train.size}x{train.size}, {train.num_classes} classes, {args.epochs} epochs; "
          f"{world} x {args.device}, {args.threads} threads; writing to {run.folder}", flush=True)
    seeds = range(args.seed, args.seed + args.seeds)
    rows = train_stand_alone(run, args, space, train, test,
                             [(config, seed) for seed in seeds for config in configs])
    if rank:
        return  # rank 0 reports

    values = by_config([row for row in rows if row["seed"] in seeds])
    found, default = config_name(found), config_name(space.default)
    summary = {name: {"test_accuracy": mean(values[name]), "std": spread(values[name]),
                      "seeds": len(values[name]), "parameters": space.parameters,
                      "macs": space.macs[config]}
               for config, name in zip(configs, map(config_name, configs))}
    gap, between, p = compare(values[found], values[default])
    run.save("result.json", run.record | {
        "found": found, "default": default, "gap": gap, "gap_interval": between, "p_value": p,
        "configs": summary})
    print(f"\n{'configuration':13}  {'test accuracy':>17}  seeds  parameters  Mmult-adds")
    for name, entry in summary.items():
        print(f"{name:13}  {entry['test_accuracy']:8.4f} +- {entry['std']:.4f}  "
              f"{entry['seeds']:5}  {entry['parameters']:10,}  {entry['macs'] / 1e6:10.1f}"
              + ("  default" if name == default else ""))
    print(f"\n{found} is {gap:+.4f} against the default"
          + (f", paired over the seeds: 95 % {between[0]:+.4f} to {between[1]:+.4f}, p = {p:.3f}"
             if between else "") + f" (in {run.folder}/result.json)")


if __name__ == "__main__":
    run_script(main)
