"""Stage 3: train found configurations from scratch, beside the default, on all training images.

    python retrain.py --from runs/mixture-cifar10                    # the pick of a search
    python retrain.py --from runs/seed0 runs/seed1 --top 3           # the first three of two seeds
    python retrain.py --config 5,3,2 --dataset cifar10 --seeds 5
    torchrun --nproc-per-node=6 retrain.py --from runs/mixture-cifar10

--from takes over the search's settings of the data and the network, unless they are given here, and
averages the ranks of several searches. Beside the default it also trains the rule's network: the
one that needs no search, with the most layers at full resolution among those of no more
multiply-adds than the pick. Each configuration is compared with the default seed by seed: the same
seed means the same order of images and the same crops.
Writes runs/retrain-<dataset>/: config.json, networks/<config>-<seed>.pt (checkpoint, then the
trained network) and .json (accuracy, history of its epochs), results.csv (a row a finished
network), result.json (accuracies, multiply-adds, differences to the default with intervals, p and
verdicts), comparison.png. The same command, also with a larger --top or more --seeds, goes on.
Source: arXiv:2306.11982, section 4 (retraining).
"""
from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import mean

import common
from common import Config, Space, UserError, config_name, in_range, rank, standard_deviation


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
    usual = common.protocol(settings.get("dataset"), settings["arch"])  # of runs older than --flip
    for folder, result, ranking in zip(folders, results, rankings):
        for name in sorted(common.ROLES["one in all searches"]):
            if result["settings"].get(name, usual.get(name)) != settings.get(name, usual.get(name)):
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
    parser = common.make_parser(__doc__)
    common.add_training_flags(parser, seeds=3)
    add = parser.add_argument_group("what to train: one of the first two").add_argument
    add("--from", dest="source", nargs="+", metavar="RUN",
        help="run folders of searches that differ in nothing but, say, their seed")
    add("--config", metavar="N,N,N", help="the configuration, e.g. 5,3,2")
    add("--top", type=in_range(int, 1), default=1, metavar="K",
        help="train the first K of the ranking of --from")
    source = parser.parse_known_args(argv)[0].source
    settings, rankings = read_searches(source) if source else ({}, [])
    taken_over = {name: settings[name] for name in common.ROLES["taken over by stage 3"]
                  if name in settings}
    args = common.parse_arguments(parser, argv, search=False, taken_over=taken_over)
    if (args.source is None) == (args.config is None):
        parser.error("give either --from RUN, a search's folder, or --config, as in 5,3,2")
    if source and os.path.isabs(args.dataset) and not os.path.exists(args.dataset):
        raise UserError(f"the data set of {source[0]} is not at {args.dataset} any more: say "
                        "where it is with --dataset")
    return args, settings, rankings


def rule_network(pick: Config, macs: dict[Config, int]) -> Config:
    """The rule's network, which needs no search: of the configurations of no more multiply-adds
    (macs) than the pick, the one with the most layers at full resolution; of several such, the one
    of the most multiply-adds."""
    affordable = [config for config in macs if macs[config] <= macs[pick]]
    return max(affordable, key=lambda config: (config[0], macs[config]))


def paired_comparison(accuracies: list[float],
                      default: list[float]) -> tuple[float, list[float] | None, float | None]:
    """Mean difference of accuracies paired by seed; its 95 % interval and p by Student's paired
    t-test, None where the differences have no spread."""
    from scipy.stats import ttest_rel
    differences = [a - b for a, b in zip(accuracies, default)]
    if standard_deviation(differences) < 1e-12:
        return mean(differences), None, None
    test = ttest_rel(accuracies, default)
    interval = [round(float(end), 4) for end in test.confidence_interval()]
    return mean(differences), interval, float(test.pvalue)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """The p values, corrected for being several (Holm 1979)."""
    corrected = {}
    largest = 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        corrected[name] = largest
    return corrected


def compare(accuracies: dict[Config, list[float]], space: Space) -> dict[str, dict]:
    """What result.json says of each configuration, the most accurate first. verdict: whether it is
    shown, at the 5 % level by Holm's p, to be "better" or "worse" than the default."""
    entries = {}
    for config in sorted(accuracies, key=lambda config: -mean(accuracies[config])):
        values = accuracies[config]
        name = config_name(config)
        entries[name] = {"test_accuracy": mean(values), "std": standard_deviation(values),
                         "seeds": len(values), "macs": space.macs[config],
                         "relative_macs": space.relative_macs(config)}
        if config != space.default:
            difference, interval, p = paired_comparison(values, accuracies[space.default])
            entries[name] |= {"difference": difference, "interval": interval, "p_value": p}
    tested = {name: entry["p_value"] for name, entry in entries.items()
              if entry.get("p_value") is not None}
    for name, p in holm(tested).items():
        verdict = "better" if entries[name]["difference"] > 0 else "worse"
        entries[name] |= {"p_holm": p, "verdict": verdict if p < 0.05 else "not shown"}
    return entries


def conclusion(entries: dict[str, dict]) -> str:
    """How to read the table of the entries, and what it cannot show."""
    if len(entries) == 1:
        return "Only the default has been trained: there is nothing to compare."
    tested = [entry for entry in entries.values() if "p_holm" in entry]
    if not tested:
        return "Nothing can be concluded from a difference without spread: give more --seeds."
    half = mean((entry["interval"][1] - entry["interval"][0]) / 2 for entry in tested)
    seeds = tested[0]["seeds"]
    unseen = f"With {seeds} seeds differences below about {min(half, 1):.4f} go unseen."
    return ("difference: to the default, with its 95 % interval\n"
            f"verdict: what is shown at the 5 % level, by Holm's p over {len(tested)}\n"
            f"{unseen} All this is for these epochs and this data.")


def main(argv: list[str] | None = None) -> None:
    args, searched, rankings = arguments(argv)
    common.prepare_torch(args)

    train, test = data = common.load_dataset(args)
    space = common.search_space(args, train)
    mean_ranks = average_ranks(rankings) if rankings else {args.config: 1.0}
    ranking = [common.parse_config(name, space.default) for name in mean_ranks]
    chosen = [config for config in ranking if config in space.configs][:args.top]
    if not chosen:
        raise UserError(f"--max-macs {args.max_macs} allows no configuration of the ranking")
    rule = rule_network(chosen[0], space.macs) if rankings else None
    configs = [config for config in dict.fromkeys([*chosen, space.default, rule]) if config]
    seeds = range(args.seed, args.seed + args.seeds)
    folder, record = common.open_run("retrain", args, data)
    common.choose_kernel(args, folder, record, space, train)
    if searched and searched["data"] != record["settings"]["data"]:
        print("note: these are other images than the search's")
    agreement = common.mean_tau(rankings)
    if agreement is not None:
        print(f"{len(rankings)} searches agree with Kendall tau {agreement:.3f}, mean over pairs; "
              "by mean rank: " + ", ".join(f"{name} ({mean_ranks[name]:.1f})"
                                           for name in [*mean_ranks][:max(5, args.top)]))
    print(f"{len(configs)} configurations x {args.seeds} seeds x {args.epochs} epochs:",
          common.describe(args, train, test, folder), flush=True)
    pairs = [(config, seed) for seed in seeds for config in configs]
    rows, diverged = common.train_networks(folder, args, train, test, pairs)
    if rank > 0:
        return

    rows = [row for row in rows if row["seed"] in seeds]
    accuracies = {config: values for config, values in common.by_config(rows).items()
                  if len(values) == args.seeds}  # also those of a larger --top or a --config
    if space.default not in accuracies:  # there is nothing to compare with
        raise diverged
    default = config_name(space.default)
    entries = compare(accuracies, space)
    common.save(folder / "result.json", record | {
        "chosen": [config_name(config) for config in chosen], "default": default,
        "rule": config_name(rule) if rule else None, "mean_ranks": mean_ranks,
        "kendall_tau_between_searches": agreement, "configs": entries})
    common.plot_results(folder / "comparison.png", accuracies, "test accuracy", space,
                        f"{Path(args.dataset).name}, {args.arch}, trained alone")
    columns = {"config": "", "test_accuracy": ".4f", "std": ".4f", "relative_macs": ".2f",
               "difference": "+.4f", "interval": "", "p_holm": ".3f", "verdict": ""}
    table = [{"config": name} | entries[name] for name in entries]
    common.print_ranking(table, columns, default, first=len(table))
    print(conclusion(entries))
    if rule == chosen[0]:
        print("The rule's network, which needs no search, is the pick itself.")
    elif rule in accuracies and chosen[0] in accuracies:
        difference, interval, p = paired_comparison(accuracies[chosen[0]], accuracies[rule])
        tested = "" if p is None else f" ({interval}, p = {p:.3f})"
        print(f"The pick is {difference:+.4f}{tested} from the rule's network, "
              f"{config_name(rule)}, which needs no search.")
    better = [name for name, entry in entries.items() if entry.get("verdict") == "better"]
    take = min(better, key=lambda name: entries[name]["relative_macs"], default=default)
    why = "of those shown to be better, the one of the fewest multiply-adds"
    if not better:
        why = "the default: none is shown to be better"
    print(f"take {take}, {why}; "
          f"for common.load_network: {folder}/networks/{take}-{args.seed}.pt")
    if diverged:
        raise diverged


if __name__ == "__main__":
    common.run_script(main)
