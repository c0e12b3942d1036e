"""Compare finished searches with the ground truth.

    python results/compare.py --ground-truth results/ground-truth/results.csv results/searches/*

Prints a Markdown table. Runs that differ only in the seed share a row: mean +- standard deviation.
A short run of train_exhaustive.py counts as a search, too. The columns:
- training cost: multiply-adds of the training; 1: the shortest uniform run of one SuperNet
- tau in n1: Kendall tau over the pairs with equally many layers at full resolution (n1)
- regret: test accuracy that the pick loses to the best configuration
- n1 at its macs: regret of the rule's network (see retrain.py), which needs no search
- regret of 3: regret of the best of the first three, as after retraining them
- found: how many runs have one of the three best configurations among their first four
- agree: Kendall tau of two runs of the row, mean over all pairs
- averaged: Kendall tau and regret after the ranks of the row's runs are averaged
The last two rows need no search: they rank by n1 and by multiply-adds. Below the table each row is
compared with the first one over their common seeds, if these are three or more (Student's paired
t-test). --out draws compare.png: Kendall tau over the epochs of runs with --rank-every.
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
# settings that change nothing in what is compared: rows do not differ by them
IGNORED = {"out", "data_dir", "cache_dir", "device", "threads", "ground_truth", "rank_every",
           "config", "seeds", "source", "top", "seed", "kernel", "data"}


def read_search(folder: Path) -> dict:
    """result.json; besides, "accuracies" and "macs" (multiply-adds) by configuration, "steps" and
    "training_macs" of the whole training, and "rankings", the lines of log.jsonl with a ranking."""
    log = folder / "log.jsonl"
    try:
        search = json.loads((folder / "result.json").read_text())
        alone = search["settings"]["stage"] == "exhaustive"
        if not alone:
            search["settings"].setdefault("draw", "uniform")  # older versions had no other
        search |= {"accuracies": {}, "macs": {}, "steps": 0, "training_macs": 0}
        for entry in search["ranking"]:
            config = common.parse_config(entry["config"])
            search["accuracies"][config] = entry["test_accuracy" if alone else "accuracy"]
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
    """The settings that have several values. That some searches lack a setting does not count."""
    values = {}
    for search in searches:
        for name, value in search["settings"].items():
            values.setdefault(name, set()).add(str(value))
    return [name for name in values if len(values[name]) > 1 and name not in IGNORED]


def judge(ranking: dict[tuple, float], truth: dict[tuple, float], macs: dict[tuple, int]) -> dict:
    """The metrics of a ranking: what is the larger, the better the configuration."""
    signs = []
    for a, b in itertools.combinations(ranking, 2):
        if a[0] == b[0] and truth[a] != truth[b]:
            sign = (ranking[a] > ranking[b]) - (ranking[a] < ranking[b])
            signs.append(sign if truth[a] > truth[b] else -sign)
    first = sorted(ranking, key=lambda config: (-ranking[config], config))[:4]
    best = sorted(ranking, key=truth.get, reverse=True)[:3]
    rule = retrain.rule_network(first[0], macs)
    return common.rank_metrics(ranking, truth) | {
        "tau in n1": mean(signs) if signs else None,
        "n1 at its macs": truth[best[0]] - truth[rule],
        "regret of 3": truth[best[0]] - max(truth[config] for config in first[:3]),
        "found": any(config in best for config in first),
        "pick": common.config_name(first[0])}


def compare_with_first(rows: dict[tuple, list[dict]]) -> None:
    """Print how each row differs from the first one, over the seeds that both have."""
    names = [", ".join(value for value in row if value) for row in rows]
    by_seed = [{run["settings"]["seed"]: run for run in runs} for runs in rows.values()]
    for name, searches in zip(names[1:], by_seed[1:]):
        for metric in ("kendall_tau", "regret"):
            pairs = [(searches[seed][metric], by_seed[0][seed][metric])
                     for seed in sorted(searches.keys() & by_seed[0].keys())]
            pairs = [pair for pair in pairs if None not in pair]  # a tau may be undefined
            if len(pairs) > 2:
                difference, _, p = retrain.paired_comparison(*zip(*pairs))
                tested = "" if p is None else f", p = {p:.2g}"
                print(f"- {name} against {names[0]}: "
                      f"{metric} {difference:+.3f}{tested}, n = {len(pairs)}")


def mean_and_deviation(values: list[float | None], digits: int) -> str:
    values = [value for value in values if value is not None]
    deviation = f" +- {common.standard_deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}" if values else "-"


def metric_cells(runs: list[dict], truth: dict[tuple, float], macs: dict[tuple, int]) -> list[str]:
    """The cells of a row from those of DIGITS on."""
    cells = [mean_and_deviation([run[name] for run in runs], DIGITS[name]) for name in DIGITS]
    agree = averaged_metrics = ""
    if len(runs) > 1:
        rankings = [run["accuracies"] for run in runs]
        averaged = {config: -rank for config, rank in retrain.average_ranks(rankings).items()}
        metrics = judge(averaged, truth, macs)
        tau = mean_and_deviation([metrics["kendall_tau"]], 3)
        averaged_metrics = f"{tau}, {metrics['regret']:.3f}"
        agree = mean_and_deviation([common.mean_tau(rankings)], 3)
    return [*cells, f"{sum(run['found'] for run in runs)} of {len(runs)}", agree, averaged_metrics,
            "; ".join(run["pick"] for run in runs)]


def plot(columns: list[str], curves: dict[tuple, dict[int, list[float]]], path: Path) -> None:
    """Draw `curves`, the Kendall taus of the runs by row and epoch."""
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
        macs.update(search["macs"])
    macs = dict(sorted(macs.items()))  # of equal configurations the first is the pick
    truth = common.read_ground_truth(args.ground_truth, list(macs))
    columns = differing_settings(searches)
    single = [search for search in searches if search["settings"]["stage"] == "single"]
    uniform = [search for search in single if search["settings"]["draw"] == "uniform"]
    shortest = min((search["steps"] for search in uniform or single), default=0)
    unit = shortest * mean(macs.values())
    rows = {}  # searches by the values of the differing settings
    curves = {}
    for search in searches:
        search |= judge(search["accuracies"], truth, macs)
        search["training cost"] = search["training_macs"] / unit if unit else None
        row = (*[str(search["settings"].get(name, "")) for name in columns],
               f"{search['steps']:,}")
        rows.setdefault(row, []).append(search)
        for line in search["rankings"]:
            ranking = {common.parse_config(name): line["ranking"][name] for name in line["ranking"]}
            tau = common.rank_metrics(ranking, truth)["kendall_tau"]
            if tau is not None:  # it is undefined where all accuracies are equal
                curves.setdefault(row, {}).setdefault(line["epoch"], []).append(tau)

    header = [*columns, "steps", "runs", *DIGITS, "found", "agree", "averaged", "picks"]
    table = [header, ["---"] * len(header)]
    for row, runs in rows.items():
        table.append([*row, str(len(runs)), *metric_cells(runs, truth, macs)])
    free = {"by n1": {config: config[0] for config in macs}, "by multiply-adds": macs}
    empty = [""] * (len(columns) + 1)
    for name, ranking in free.items():
        metrics = judge(ranking, truth, macs) | {"training cost": 0.0}
        table.append([name, *empty, *metric_cells([metrics], truth, macs)])
    print(*("| " + " | ".join(cells) + " |" for cells in table), "", sep="\n")
    compare_with_first(rows)
    if args.out and curves:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(columns, curves, args.out / "compare.png")


if __name__ == "__main__":
    common.run_script(main)
