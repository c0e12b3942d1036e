"""Stage 3: train a found configuration from scratch, beside the default, on all training images.

    python retrain.py --from runs/mixture-cifar10    # the pick of a search
    python retrain.py --config 5,3,2 --dataset cifar10 --seeds 3
    torchrun --nproc-per-node=6 retrain.py --from runs/mixture-cifar10

--from takes the settings of the data and the network over from the search, unless given here.
Writes runs/retrain-<dataset>/: config.json, networks/<config>-<seed>.pt (checkpoint, then the
trained weights) and .json (accuracy, history of its epochs), results.csv (a row a finished
network), result.json (mean and standard deviation of the test accuracy, gap to the default with a
paired t-test over the seeds, cost of both). The same command continues a stopped run.
Source: arXiv:2306.11982, section 4 (retraining).
"""
from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import torch

import common
from common import Run, UserError, config_name, number, rank, spread, world

# what --from takes over from the search
TAKEN_OVER = {"dataset", "data_dir", "cache_dir", "test_fraction", "image_size", "num_train",
              "arch", "num_resolutions", "downsample", "width", "metric"}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, search=False)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--from", dest="source", metavar="RUN", help="run folder of a search")
    choice.add_argument("--config", metavar="N,N,N", help="the configuration, e.g. 5,3,2")
    parser.add_argument("--seeds", type=number(int, 1, 1000), default=3, metavar="N",
                        help="networks a configuration, seeds --seed, --seed + 1, ...")

    # the search's settings become the defaults, so --from is read before the rest
    early = common.Parser(add_help=False)
    early.add_argument("--from", dest="source")
    source = early.parse_known_args(argv)[0].source
    if source:
        path = Path(source) / "result.json"
        result = common.load(path) if path.exists() else {}
        if "pick" not in result:
            raise UserError(f"{source} holds no finished search (result.json with a pick)")
        settings = result["settings"]
        if settings["arch"] not in common.ARCHS:
            raise UserError(f"--arch {settings['arch']} is unknown here: run the script that adds "
                            "it to common.ARCHS, and let it call retrain.main")
        parser.set_defaults(config=result["pick"], **{
            name: value for name, value in settings.items() if name in TAKEN_OVER})
    args = common.fill_defaults(parser.parse_args(argv), search=False)
    if source and not (args.dataset in common.DATASET_PROTOCOLS or Path(args.dataset).exists()):
        raise UserError(f"the data set of {source} is not at {args.dataset} any more: say where "
                        "it is with --dataset")
    return args


def paired_comparison(pick: list[float],
                      default: list[float]) -> tuple[float, list[float] | None, float | None]:
    """Mean difference of accuracies paired by seed; its 95 % interval and p by Student's paired
    t-test, None where the differences have no spread. The same seed means the same order of
    images and the same crops."""
    from scipy.stats import ttest_rel
    differences = [a - b for a, b in zip(pick, default)]
    if spread(differences) < 1e-12:
        return mean(differences), None, None
    test = ttest_rel(pick, default)
    return mean(differences), list(test.confidence_interval()), float(test.pvalue)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    common.join_ranks()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    args.device = common.choose_device(args.device)
    common.keep_freed_memory()

    train, test = data = common.load_dataset(args)
    space = common.search_space(args, train)
    pick = common.parse_config(args.config, space.default)
    configs = list(dict.fromkeys([pick, space.default]))
    seeds = range(args.seed, args.seed + args.seeds)
    run = Run("retrain", args, data, space)
    print(f"{len(configs)} configurations x {args.seeds} seeds x {args.epochs} epochs:",
          common.describe(args, train, test, run.folder), flush=True)
    pairs = [(config, seed) for seed in seeds for config in configs]
    common.train_pairs(run.folder, args, train, test, pairs[rank::world])
    if rank > 0:
        return

    rows = [row for row in common.collect_results(run.folder) if row["seed"] in seeds]
    accuracies = common.by_config(rows)
    summary = {}
    print("\nconfiguration      test accuracy  seeds  Mmult-adds")
    for config in configs:
        name = config_name(config)
        values = accuracies[config]
        summary[name] = {"test_accuracy": mean(values), "std": spread(values),
                         "seeds": len(values), "macs": space.macs[config]}
        print(f"{name:13}  {mean(values):.4f} +- {spread(values):.4f}  {len(values):5}  "
              f"{space.macs[config] / 1e6:10.1f}" + "  default" * (config == space.default))

    gap, interval, p = paired_comparison(accuracies[pick], accuracies[space.default])
    common.save(run.folder / "result.json", run.record | {
        "found": config_name(pick), "default": config_name(space.default), "gap": gap,
        "gap_interval": interval, "p_value": p, "configs": summary})
    conclusion = f"{config_name(pick)} is {gap:+.4f} against the default"
    if interval:
        conclusion += (f", paired over the seeds: 95 % {interval[0]:+.4f} to {interval[1]:+.4f}, "
                       f"p = {p:.3f}")
    print(f"\n{conclusion}\nthe trained network, for common.load_network: "
          f"{run.folder}/networks/{config_name(pick)}-{args.seed}.pt")


if __name__ == "__main__":
    common.run_script(main)
