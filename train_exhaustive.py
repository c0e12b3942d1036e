"""Stage 1: train pooling configurations on their own, from scratch: the ground truth of a search.

    python train_exhaustive.py --dataset cifar10 --epochs 200 --seeds 3    # all 36: days on a CPU
    python train_exhaustive.py --configs 4,3,3 7,1,2                       # a few, on digits
    torchrun --nproc-per-node=8 train_exhaustive.py --dataset cifar10      # a network a process

Writes runs/exhaustive-<dataset>/: config.json, results.csv (a row a finished network: config, seed,
test_accuracy, ...; what --ground-truth of the searches takes), log.jsonl (a line an epoch),
result.json (best first), ranking.png, checkpoints meanwhile. The same command, also with more
--seeds or other --configs, skips what is finished and continues what was interrupted.
Source: arXiv:2306.11982, section 4 (brute force).
"""
import argparse
import csv
import itertools
import math
from statistics import mean

import torch

from common import (Config, Gauge, Images, Learner, Parser, Run, Space, barrier, by_config,
                    config_name, deal, evaluate_configs, expected_time, load_dataset, make_network,
                    number, parse_config, plot_results, progress, rank, rank_metrics, read_results,
                    read_steps, replacing, report_speed, run_script, seal, search_space, spread,
                    stream, stream_seed, world)

COLUMNS = "config", "seed", "test_accuracy", "train_accuracy", "train_loss", "checksum"


def train_stand_alone(run: Run, args: argparse.Namespace, space: Space, train: Images,
                      test: Images, pairs: list[tuple[Config, int]]) -> list[dict]:
    """Stages 1 and 3: train a network of its own for every (configuration, seed), and write each
    finished one to results.csv at once. Finished pairs are skipped, an interrupted one continues.
    Returns the rows of results.csv when all ranks are done.

    Protocol (paper): SGD, learning rate x0.1 at 40, 60, 80 and 90 % of the epochs, the accuracy
    of the last epoch on the test images.
    """
    path, steps = run.folder / "results.csv", train.num_batches(args.batch_size)
    rows = read_results(path) if path.exists() else []
    done, pairs = {(row["config"], row["seed"]) for row in rows}, list(dict.fromkeys(pairs))
    todo = [pair for pair in pairs if (config_name(pair[0]), pair[1]) not in done]
    if todo:
        probe = Learner(make_network(args, train, False), args)
        total = sum(space.macs[config] for config, _ in todo)
        expected = expected_time(probe, train, args.batch_size, space,
                                 total * len(train) * args.epochs, total * len(test))
        print(f"{len(pairs) - len(todo)} finished, {len(todo)} to train; expected time {expected}",
              flush=True)
        gauge = Gauge(args.device)
    bar = progress(total=len(todo) * args.epochs * steps, unit="step")
    for config, seed in deal(pairs):  # the same list on every rank, however far the others are
        name, key = config_name(config), f"-{config_name(config)}-{seed}"
        if (name, seed) in done:
            run.drop_checkpoint(key)  # a kill may have left it
            continue
        learner = Learner(make_network(args, train, False, stream_seed(seed, "weights")), args)
        state, start = run.load_checkpoint(key), 0
        if state:
            learner.load_state_dict(state["learner"])
            start, loss, correct = (state[key] for key in ("epoch", "loss", "correct"))
        run.trim_log(lambda line: (line["config"], line["seed"]) != (name, seed)
                     or line["epoch"] <= start)
        bar.update(start * steps)
        for epoch in range(start, args.epochs):
            gauge.restart()
            passed = sum(epoch >= part * args.epochs for part in (0.4, 0.6, 0.8, 0.9))
            lr, record, sizes = args.lr * 0.1 ** passed, [], []
            order, crops = (stream(seed, name, epoch) for name in ("order", "crops"))
            batches = train.passes(args.batch_size, order, crops)
            learner.network.train()
            for step, (images, labels) in zip(range(steps), batches):
                where = f"epoch {epoch + 1}, step {step + 1}, configuration {name}, seed {seed}"
                record.append((where, learner.step(images, labels, config, lr)))
                sizes.append(len(labels))
                gauge.macs += 3 * space.macs[config] * len(labels)
                bar.update(world)  # on rank 0; the others are about as fast
            weights = torch.tensor(sizes, dtype=torch.float64) / len(train)
            loss, correct = (weights @ read_steps(record, learner.network)).tolist()
            line = dict(config=name, seed=seed, epoch=epoch + 1, **gauge.epoch(len(train)),
                        train_loss=loss, train_accuracy=correct, lr=lr)
            bar.set_postfix_str(f"{name} seed {seed}, train accuracy {correct:.3f}, "
                                f"utilisation {line['utilisation']:.2f}")
            run.log(**line)
            run.save_checkpoint(key, epoch=epoch + 1, learner=learner.state_dict(), loss=loss,
                                correct=correct)
        result = evaluate_configs(learner.network.eval(), [config],
                                  test.evaluation_batches(args.batch_size)).double().mean().item()
        add_row(run, dict(zip(COLUMNS, (name, seed, result, correct, loss))))
        run.drop_checkpoint(key)
    bar.close()
    barrier()
    report_speed(run)
    return read_results(path)


def add_row(run: Run, row: dict) -> None:
    """Add a row to results.csv, sorted by seed and configuration, whichever rank was first."""
    path = run.folder / "results.csv"
    with run.locked():
        row["checksum"] = seal({key: str(value) for key, value in row.items()})["checksum"]
        rows = [*(read_results(path) if path.exists() else []), row]
        rows.sort(key=lambda row: (row["seed"], parse_config(row["config"])))
        with replacing(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def tau_between_seeds(rows: list[dict]) -> float | None:
    """Kendall tau of two seeds' accuracies over the configurations that both have, mean over the
    pairs of seeds: what one training of everything tells about the next. None without a pair."""
    seeds = {}
    for row in rows:
        seeds.setdefault(row["seed"], {})[row["config"]] = row["test_accuracy"]
    taus = [rank_metrics({name: a[name] for name in a if name in b}, b)["kendall_tau"]
            for a, b in itertools.combinations(seeds.values(), 2) if a.keys() & b.keys()]
    taus = [tau for tau in taus if tau is not None]
    return mean(taus) if taus else None


def main() -> None:
    parser = Parser(__doc__, search=False)
    group = parser.add_argument_group("stage 1")
    group.add_argument("--seeds", type=number(int, 1, 1000), default=1, metavar="N",
                       help="networks a configuration, seeds --seed, --seed + 1, ...")
    args = parser.parse_args()
    train, test = data = load_dataset(args)
    space = search_space(args, train, supernet=False)
    run = Run("exhaustive", args, data)
    print(f"{args.arch} x {args.seeds} seeds on {args.dataset}: {len(train)} training and "
          f"{len(test)} test images {train.size}x{train.size}, {train.num_classes} classes, "
          f"{args.epochs} epochs; {space}; {world} x {args.device}, {args.threads} threads; "
          f"writing to {run.folder}", flush=True)
    # seeds outside: the first pass over the configurations is already a ground truth
    rows = train_stand_alone(run, args, space, train, test, [
        (config, args.seed + i) for i in range(args.seeds) for config in space.configs])
    if rank:
        return  # rank 0 reports

    values = by_config(rows)
    means = {name: mean(found) for name, found in values.items()}
    order = sorted(means, key=means.get, reverse=True)
    tau = tau_between_seeds(rows)
    between_configs = spread(list(means.values()))
    repeated = [spread(found) ** 2 for found in values.values() if len(found) > 1]
    between_seeds = math.sqrt(mean(repeated or [0.0]))
    run.save("result.json", run.record | {
        "kendall_tau_between_seeds": tau, "std_between_configs": between_configs,
        "std_between_seeds": between_seeds, "ranking": [
            {"config": name, "test_accuracy": means[name], "std": spread(values[name]),
             "seeds": len(values[name])} for name in order]})
    default = config_name(space.default)
    plot_results(run.folder / "ranking.png", values, "test accuracy", default)
    print(f"\n{'rank':>4}  {'configuration':13}  {'test accuracy':>13}  {'std':>6}  seeds")
    for place, name in enumerate(order, 1):
        if place <= 10 or place == len(order) or name == default:
            print(f"{place:4}  {name:13}  {means[name]:13.4f}  {spread(values[name]):6.4f}  "
                  f"{len(values[name]):5}" + ("  default" if name == default else ""))
    print(f"\nbest {order[0]}; best to worst {means[order[0]] - means[order[-1]]:.4f}; standard "
          f"deviation between configurations {between_configs:.4f}, between seeds "
          f"{between_seeds:.4f}" + ("" if tau is None else f"; Kendall tau of two seeds {tau:.3f}"))
    print(f"next: python search_mixture.py --dataset {args.dataset} "
          f"--ground-truth {run.folder}/results.csv")


if __name__ == "__main__":
    run_script(main)
