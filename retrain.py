"""Stage 3: train found configurations from scratch, beside the default, on all training images.

    python retrain.py --from runs/mixture-cifar10                    # the pick of a search
    python retrain.py --from runs/seed0 runs/seed1 --top 3           # the first three of two seeds
    python retrain.py --config 5,3,2 --dataset cifar10 --seeds 5
    torchrun --nproc-per-node=6 retrain.py --from runs/mixture-cifar10

--from takes the settings of the data and the network over from the search, unless given here; the
ranks of several searches are averaged. Each configuration is compared with the default seed by
seed: the same seed means the same order of images and the same crops.
Writes runs/retrain-<dataset>/: config.json, networks/<config>-<seed>.pt (checkpoint, then the
trained network) and .json (accuracy, history of its epochs), results.csv (a row a finished
network), result.json (accuracies, costs, differences to the default with intervals and p),
comparison.png. The same command, also with a larger --top or more --seeds, goes on.
Source: arXiv:2306.11982, section 4 (retraining).
"""
from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import common
from common import Config, Run, Space, UserError, config_name, number, rank, spread, world

# what --from takes over from the search
TAKEN_OVER = {"dataset", "data_dir", "cache_dir", "test_fraction", "image_size", "num_train",
              "arch", "num_resolutions", "downsample", "width", "metric"}


def read_searches(folders: list[str]) -> tuple[dict, list[dict[str, float]]]:
    """The settings of finished searches, which must be of the same data and network, and each
    one's accuracies by configuration."""
    results = []
    for folder in folders:
        path = Path(folder) / "result.json"
        result = common.load(path) if path.exists() else {}
        if "pick" not in result:
            raise UserError(f"{folder} holds no finished search (result.json with a pick)")
        config = path.with_name("config.json")  # knows where the data were last seen
        results.append(result | (common.load(config) if config.exists() else {}))
    settings = results[0]["settings"]
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise UserError("--from: the same run twice tells nothing new")
    rankings = [{entry["config"]: entry["accuracy"] for entry in result["ranking"]}
                for result in results]
    for folder, result, ranking in zip(folders, results, rankings):
        for name in ("data", "metric", "arch", "num_resolutions", "downsample", "width"):
            if result["settings"].get(name) != settings.get(name):
                raise UserError(f"{folder} is a search of another {name} than {folders[0]}")
        if ranking.keys() != rankings[0].keys():
            raise UserError(f"{folder} ranks other configurations than {folders[0]}")
    if settings["arch"] not in common.ARCHS:
        raise UserError(f"--arch {settings['arch']} is unknown here: run the script that adds it "
                        "to common.ARCHS, and let it call retrain.main")
    return settings, rankings


def average_ranks(rankings: list[dict[str, float]]) -> dict[str, float]:
    """Each configuration's rank (1 = best; ties share theirs), mean over the rankings, best
    first."""
    from scipy.stats import rankdata
    ranks = rankdata([[-ranking[config] for config in rankings[0]] for ranking in rankings], axis=1)
    means = dict(zip(rankings[0], ranks.mean(0).tolist()))
    return {config: means[config] for config in sorted(means, key=means.get)}


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, dict, list[dict[str, float]]]:
    """The arguments; the settings of the searches of --from, and their rankings."""
    parser = common.make_parser(__doc__, search=False)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--from", dest="source", nargs="+", metavar="RUN",
                        help="run folders of searches that differ in nothing but, say, their seed")
    choice.add_argument("--config", metavar="N,N,N", help="the configuration, e.g. 5,3,2")
    parser.add_argument("--top", type=number(int, 1), default=1, metavar="K",
                        help="train the first K of the ranking of --from")
    parser.set_defaults(seeds=3)
    source = parser.parse_args(argv).source
    settings, rankings = read_searches(source) if source else ({}, [])
    # the search's settings become the defaults of a second reading
    parser.set_defaults(**{name: settings[name] for name in TAKEN_OVER & settings.keys()})
    args = common.fill_defaults(parser.parse_args(argv), search=False)
    if source and not (args.dataset in common.DATASET_PROTOCOLS or Path(args.dataset).exists()):
        raise UserError(f"the data set of {source[0]} is not at {args.dataset} any more: say "
                        "where it is with --dataset")
    return args, settings, rankings


def paired_comparison(accuracies: list[float],
                      default: list[float]) -> tuple[float, list[float] | None, float | None]:
    """Mean difference of accuracies paired by seed; its 95 % interval and p by Student's paired
    t-test, None where the differences have no spread."""
    from scipy.stats import ttest_rel
    differences = [a - b for a, b in zip(accuracies, default)]
    if spread(differences) < 1e-12:
        return mean(differences), None, None
    test = ttest_rel(accuracies, default)
    return mean(differences), list(test.confidence_interval()), float(test.pvalue)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """The p values, corrected for being several (Holm 1979)."""
    corrected = {}
    largest = 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        corrected[name] = largest
    return corrected


def compare(accuracies: dict[Config, list[float]], space: Space) -> dict[str, dict]:
    """What result.json says of each configuration, the most accurate first."""
    entries = {}
    for config in sorted(accuracies, key=lambda config: -mean(accuracies[config])):
        values = accuracies[config]
        name = config_name(config)
        entries[name] = {"test_accuracy": mean(values), "std": spread(values),
                         "seeds": len(values), "macs": space.macs[config],
                         "cost": space.cost(config)}
        if config != space.default:
            difference, interval, p = paired_comparison(values, accuracies[space.default])
            entries[name] |= {"difference": difference, "interval": interval, "p_value": p}
    tested = {name: entry["p_value"] for name, entry in entries.items()
              if entry.get("p_value") is not None}
    for name, p in holm(tested).items():
        entries[name]["p_holm"] = p
    return entries


def shown(entries: dict[str, dict], sign: int) -> list[str]:
    """The configurations shown to be better (sign 1) or worse (-1) than the default: 5 % level, by
    Holm's p."""
    return [name for name, entry in entries.items()
            if entry.get("p_holm", 1) < 0.05 and sign * entry["difference"] > 0]


def conclusion(entries: dict[str, dict]) -> str:
    """One sentence: what the comparison shows, and what it cannot."""
    if len(entries) == 1:
        return "The default itself was chosen: there is nothing to compare."
    tested = {name: entry for name, entry in entries.items() if "p_holm" in entry}
    if not tested:
        return "Nothing can be concluded from a difference without spread: give more --seeds."
    better = [f"{name} ({entries[name]['difference']:+.4f} at {entries[name]['cost']:.2f} times "
              "the cost)" for name in shown(entries, 1)]
    half = mean((entry["interval"][1] - entry["interval"][0]) / 2 for entry in tested.values())
    seeds = next(iter(tested.values()))["seeds"]
    return (f"Shown to beat the default (5 % level, Holm over {len(tested)}): "
            f"{', '.join(better) or 'none'}; to be worse: "
            f"{', '.join(shown(entries, -1)) or 'none'}; with {seeds} seeds a difference below "
            f"about {half:.4f} goes unseen, and all this is for these epochs and this data.")


def main(argv: list[str] | None = None) -> None:
    args, searched, rankings = arguments(argv)
    common.prepare_torch(args)

    train, test = data = common.load_dataset(args)
    space = common.search_space(args, train)
    mean_ranks = average_ranks(rankings) if rankings else {args.config: 1.0}
    chosen = [common.parse_config(name, space.default) for name in [*mean_ranks][:args.top]]
    configs = list(dict.fromkeys([*chosen, space.default]))
    seeds = range(args.seed, args.seed + args.seeds)
    run = Run("retrain", args, data, space)
    if searched and searched["data"] != run.record["settings"]["data"]:
        print("note: these are other images than the search's")
    agreement = common.mean_tau(rankings)
    if agreement is not None:
        print(f"{len(rankings)} searches agree with Kendall tau {agreement:.3f}, mean over pairs; "
              "by mean rank: " + ", ".join(f"{name} ({mean_ranks[name]:.1f})"
                                           for name in [*mean_ranks][:max(5, args.top)]))
    print(f"{len(configs)} configurations x {args.seeds} seeds x {args.epochs} epochs:",
          common.describe(args, train, test, run.folder), flush=True)
    pairs = [(config, seed) for seed in seeds for config in configs]
    common.train_pairs(run.folder, args, train, test, pairs[rank::world])
    if rank > 0:
        return

    rows = [row for row in common.collect_results(run.folder) if row["seed"] in seeds]
    accuracies = {config: values for config, values in common.by_config(rows).items()
                  if len(values) == args.seeds}  # also those of a larger --top or a --config
    default = config_name(space.default)
    entries = compare(accuracies, space)
    common.save(run.folder / "result.json", run.record | {
        "chosen": [config_name(config) for config in chosen], "default": default,
        "mean_ranks": mean_ranks, "kendall_tau_between_searches": agreement, "configs": entries})
    common.plot_results(run.folder / "comparison.png", accuracies, "test accuracy", space)

    print("\nconfiguration      test accuracy  cost  against the default, 95 %       p (Holm)")
    for name, entry in entries.items():
        line = (f"{name:13}  {entry['test_accuracy']:.4f} +- {entry['std']:.4f}  "
                f"{entry['cost']:4.2f}")
        if "difference" in entry:
            line += f"  {entry['difference']:+.4f}"
        if "p_holm" in entry:
            low, high = entry["interval"]
            line += f" ({low:+.4f} to {high:+.4f})  {entry['p_holm']:.3f}"
        print(line + "  default" * (name == default))
    print(conclusion(entries))
    better = shown(entries, 1)
    take = min(better, key=lambda name: entries[name]["cost"], default=default)
    why = "the cheapest that is" if better else "the default: none is"
    print(f"take {take}, {why} shown to be better; "
          f"for common.load_network: {run.folder}/networks/{take}-{args.seed}.pt")


if __name__ == "__main__":
    common.run_script(main)
