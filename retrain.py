"""Stage 3: train a found configuration from scratch, beside the default, on all training images.

    python retrain.py --from runs/mixture-cifar10    # the pick of a search
    python retrain.py --config 5,3,2 --dataset cifar10 --seeds 3
    torchrun --nproc-per-node=6 retrain.py --from runs/mixture-cifar10

--from takes the settings of the data and the network over from the search, unless given here.
Writes runs/retrain-<dataset>/: config.json, results.csv (a row a finished network), log.jsonl (a
line an epoch), result.json (mean and standard deviation of the test accuracy, gap to the default,
cost of both). The same command continues a stopped run.
Source: arXiv:2306.11982, section 4 (retraining).
"""
from pathlib import Path
from statistics import mean

from common import (Parser, Run, UserError, config_name, load_dataset, number, parse_config, rank,
                    read_json, run_script, search_space, world)
from train_exhaustive import spread, train_stand_alone


def arguments():
    parser = Parser(__doc__, search=False, configs=False)
    group = parser.add_argument_group("stage 3")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--from", dest="source", metavar="RUN", help="run folder of a search")
    source.add_argument("--config", metavar="N,N,N", help="the configuration, e.g. 5,3,2")
    group.add_argument("--seeds", type=number(int, 1), default=3, metavar="N",
                       help="networks a configuration, seeds --seed, --seed + 1, ...")
    args = parser.parse_args()
    if args.source:
        folder = Path(args.source)
        if not (folder / "result.json").exists():
            raise UserError(f"{folder} holds no finished search (no result.json)")
        recorded = read_json(folder / "config.json")
        settings = {**recorded.get("settings", {}), "data_dir": recorded.get("data_dir", "data")}
        pick = read_json(folder / "result.json").get("pick")
        if pick is None:
            raise UserError(f"{folder}/result.json names no pick: --from takes a search's folder")
        parser.set_defaults(**{key: settings[key] for key in (
            "dataset", "data_dir", "image_size", "num_train", "arch", "num_resolutions",
            "downsample", "width") if key in settings})
        args = parser.parse_args()
        args.config = pick
    return args


def main() -> None:
    args = arguments()
    train, test = load_dataset(args)
    space = search_space(args, train, supernet=False)
    found = parse_config(args.config, space.default)
    configs = list(dict.fromkeys([found, space.default]))
    run = Run("retrain", args)
    print(f"{args.arch}, {' and '.join(map(config_name, configs))} x {args.seeds} seeds on "
          f"{args.dataset}: {len(train)} training and {len(test)} test images "
          f"{train.size}x{train.size}, {train.num_classes} classes, {args.epochs} epochs; "
          f"{world} x {args.device}, {args.threads} threads; writing to {run.folder}", flush=True)
    seeds = range(args.seed, args.seed + args.seeds)
    rows = train_stand_alone(run, args, space, train, test,
                             [(config, seed) for seed in seeds for config in configs])
    if rank:
        return  # rank 0 reports

    summary = {}
    for config in configs:
        values = [row["test_accuracy"] for row in rows
                  if row["config"] == config_name(config) and row["seed"] in seeds]
        summary[config_name(config)] = {
            "test_accuracy": mean(values), "std": spread(values), "seeds": len(values),
            "parameters": space.parameters, "macs": space.macs[config]}
    default = config_name(space.default)
    gap = summary[config_name(found)]["test_accuracy"] - summary[default]["test_accuracy"]
    run.save("result.json", {"found": config_name(found), "default": default, "gap": gap,
                             "configs": summary})
    print(f"\n{'configuration':13}  {'test accuracy':>17}  seeds  parameters  Mmult-adds")
    for name, entry in summary.items():
        print(f"{name:13}  {entry['test_accuracy']:8.4f} +- {entry['std']:.4f}  "
              f"{entry['seeds']:5}  {entry['parameters']:10,}  {entry['macs'] / 1e6:10.1f}"
              + ("  default" if name == default else ""))
    print(f"\n{config_name(found)} is {gap:+.4f} against the default (in {run.folder}/result.json)")


if __name__ == "__main__":
    run_script(main)
