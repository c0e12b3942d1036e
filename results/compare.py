"""Compare finished searches with the ground truth.

    python results/compare.py --ground-truth results/ground-truth/results.csv results/searches/*

Prints a Markdown table. Runs that differ in nothing but the seed share a row, mean +- standard
deviation. A short run of train_exhaustive.py is a search, too: all alone.
- training cost: multiply-adds of the training steps, relative to those of the shortest run of one supernet
  (with uniform draws, if there is one), as they would be with uniform draws
- tau in n1: Kendall tau over the pairs of configurations of equal n1 alone
- n1 at its macs: the regret of the rule's network (see retrain.py), which needs no search: of the
  configurations of no more multiply-adds than the pick the one of largest n1, of these the one of
  the most multiply-adds
- regret of 3: that of the best of the first three, as after retraining them
- found: how often one of the three best is among the first four
- agree: Kendall tau of two runs of the row, mean over the pairs
- averaged: Kendall tau and regret of the pick by the ranks averaged over the runs of the row
The last rows cost nothing: ranked by n1, the layers at full resolution, and by multiply-adds. Below
the table, every row of three or more seeds against the first one, seed by seed (Student's paired
t-test).
With --out writes compare.png: Kendall tau over the epochs of runs with --rank-every.
"""
import argparse
import itertools
import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import retrain

DIGITS = {"training cost": 2, "kendall_tau": 3, "tau in n1": 3, "pick_rank": 1, "regret": 3,
          "n1 at its macs": 3, "regret of 3": 3}
# settings that tell nothing of a search; dataset and num_train tell of its data
IGNORED = {"out", "data_dir", "cache_dir", "device", "threads", "ground_truth", "rank_every",
           "config", "seeds", "source", "top", "seed", "kernel", "data"}


def read_search(folder: Path) -> dict:
    """result.json; accuracies and macs by configuration; steps and multiply-adds of the training;
    and, as "rankings", the epochs of log.jsonl after which the run ranked."""
    log = folder / "log.jsonl"
    try:
        search = json.loads((folder / "result.json").read_text())
        accuracy = "test_accuracy"
        if search["settings"]["stage"] != "exhaustive":
            accuracy = "accuracy"
            search["settings"].setdefault("draw", "uniform")  # older versions had nothing else
        search |= {"accuracies": {}, "macs": {}, "steps": 0, "training_macs": 0}
        for entry in search["ranking"]:
            config = common.parse_config(entry["config"])
            search["accuracies"][config] = entry[accuracy]
            search["macs"][config] = entry["macs"]
            steps = sum(entry["steps"])
            search["steps"] += steps
            search["training_macs"] += steps * entry["macs"]
        lines = log.read_text().splitlines() if log.exists() else []
        search["rankings"] = [line for line in map(json.loads, lines) if "ranking" in line]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise common.UserError(f"{folder} holds no finished search: {error!r}") from error
    return search


def differing_settings(searches: list[dict]) -> list[str]:
    """Those with several values; that a script lacks a setting does not count."""
    values = {}
    for search in searches:
        for name, value in search["settings"].items():
            values.setdefault(name, set()).add(str(value))
    return [name for name in values if len(values[name]) > 1 and name not in IGNORED]


def judge(ranking: dict[tuple, float], truth: dict[tuple, float], macs: dict[tuple, int]) -> dict:
    """The metrics of a ranking, accuracies (or what else ranks) by configuration."""
    signs = []
    for a, b in itertools.combinations(ranking, 2):
        if a[0] == b[0] and truth[a] != truth[b]:
            estimated = (ranking[a] > ranking[b]) - (ranking[a] < ranking[b])
            signs.append(estimated if truth[a] > truth[b] else -estimated)
    first = sorted(ranking, key=lambda config: (-ranking[config], config))[:4]
    best = sorted(ranking, key=truth.get, reverse=True)[:3]
    affordable = [config for config in ranking if macs[config] <= macs[first[0]]]
    largest_n1 = max(affordable, key=lambda config: (config[0], macs[config]))
    return common.rank_metrics(ranking, truth) | {
        "tau in n1": mean(signs) if signs else None, "found": bool({*first} & {*best}),
        "n1 at its macs": truth[best[0]] - truth[largest_n1],
        "regret of 3": truth[best[0]] - max(truth[config] for config in first[:3]),
        "pick": common.config_name(first[0])}


def compare_seeds(rows: dict[tuple, list[dict]]) -> None:
    """Print how rows differ from the first one over the seeds that both have."""
    by_seed = {row: {search["settings"]["seed"]: search for search in searches}
               for row, searches in rows.items()}
    first, *others = by_seed
    for row in others:
        seeds = sorted(by_seed[first].keys() & by_seed[row].keys())
        for metric in ("kendall_tau", "regret"):
            pairs = [(by_seed[row][seed][metric], by_seed[first][seed][metric]) for seed in seeds]
            pairs = [pair for pair in pairs if None not in pair]  # a tau that is undefined
            if len(pairs) > 2:
                difference, _, p = retrain.paired_comparison(*zip(*pairs))
                tested = "" if p is None else f", p = {p:.2g}"
                print(f"- {', '.join(filter(None, row))} against {', '.join(filter(None, first))}: "
                      f"{metric} {difference:+.3f}{tested}, n = {len(pairs)}")


def mean_and_deviation(values: list[float | None], digits: int) -> str:
    values = [value for value in values if value is not None]
    deviation = f" +- {common.standard_deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}" if values else "-"


def judged_cells(searches: list[dict]) -> list[str]:
    """The cells of DIGITS and "found"."""
    cells = [mean_and_deviation([search[name] for search in searches], digits)
             for name, digits in DIGITS.items()]
    return [*cells, f"{sum(search['found'] for search in searches)} of {len(searches)}"]


def together(searches: list[dict], truth: dict[tuple, float], macs: dict[tuple, int]) -> list[str]:
    """The cells of "agree" and "averaged"."""
    if len(searches) < 2:
        return ["", ""]
    rankings = [search["accuracies"] for search in searches]
    averaged = {config: -rank for config, rank in retrain.average_ranks(rankings).items()}
    found = judge(averaged, truth, macs)
    return [mean_and_deviation([common.mean_tau(rankings)], 3),
            f"{mean_and_deviation([found['kendall_tau']], 3)}, {found['regret']:.3f}"]


def plot(columns: list[str], curves: dict[tuple, dict[int, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure
    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    for row, taus in curves.items():
        epochs = sorted(taus)
        means = [mean(taus[epoch]) for epoch in epochs]
        deviations = [common.standard_deviation(taus[epoch]) for epoch in epochs]
        label = ", ".join(f"{name} {value}" for name, value in zip(columns, row) if value)
        axes.errorbar(epochs, means, deviations, marker="o", capsize=3, label=label or "all")
    axes.set(xlabel="epoch", ylabel="Kendall tau: mean, standard deviation over runs")
    axes.grid(alpha=0.3)
    axes.legend()
    common.save_figure(axes.figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ground-truth", required=True, help="results.csv of train_exhaustive.py")
    parser.add_argument("--out", type=Path, help="folder for compare.png")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a search's folder")
    args = parser.parse_args()

    searches = [read_search(folder) for folder in dict.fromkeys(args.runs)]
    macs = {}
    for search in searches:
        macs |= search["macs"]
    macs = dict(sorted(macs.items()))  # the first of equal ones is the pick
    truth = common.read_ground_truth(args.ground_truth, list(macs))
    columns = differing_settings(searches)
    single = [search for search in searches if search["settings"]["stage"] == "single"]
    uniform = [search for search in single if search["settings"]["draw"] == "uniform"]
    steps = min((search["steps"] for search in uniform or single), default=0)
    unit = steps * mean(macs.values())
    rows = {}
    curves = {}  # Kendall taus by row and epoch
    for search in searches:
        search |= judge(search["accuracies"], truth, macs)
        search["training cost"] = search["training_macs"] / unit if unit else None
        row = (*[str(search["settings"].get(name, "")) for name in columns],
               f"{search['steps']:,}")
        rows.setdefault(row, []).append(search)
        for line in search["rankings"]:
            ranking = {common.parse_config(name): line["ranking"][name] for name in line["ranking"]}
            tau = common.rank_metrics(ranking, truth)["kendall_tau"]
            if tau is not None:  # not all accuracies are equal
                curves.setdefault(row, {}).setdefault(line["epoch"], []).append(tau)
    free = {"by n1": {config: config[0] for config in macs}, "by multiply-adds": macs}

    header = [*columns, "steps", "runs", *DIGITS, "found", "agree", "averaged", "picks"]
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row, runs in rows.items():
        picks = "; ".join(run["pick"] for run in runs)
        cells = [*row, str(len(runs)), *judged_cells(runs), *together(runs, truth, macs), picks]
        print("| " + " | ".join(cells) + " |")
    for name, ranking in free.items():
        found = judge(ranking, truth, macs) | {"training cost": 0.0}
        cells = [name, *[""] * (len(columns) + 1), *judged_cells([found]), "", "", found["pick"]]
        print("| " + " | ".join(cells) + " |")
    print()
    compare_seeds(rows)
    if args.out and curves:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(columns, curves, args.out / "compare.png")


if __name__ == "__main__":
    common.run_script(main)
