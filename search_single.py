"""Stage 2a, the baseline: one SuperNet, single-path one-shot (SPOS).

    python search_single.py                                     # embedded digits, minutes
    python search_single.py --dataset cifar10 --epochs 24
    python search_single.py --dataset cifar10 --draw uniform    # as in the paper

One set of weights serves all configurations: every step draws one of them (--draw) and trains that
path. At the end each configuration is evaluated with the shared weights on the validation half.

Writes runs/single-<dataset>/: config.json, log.jsonl (a line an epoch), checkpoint.pt,
supernets.pt (the weights), result.json (the ranking, the pick), ranking.png. The same command
continues a stopped run.
Source: arXiv:2306.11982, section 3; Guo et al., arXiv:1904.00420.
"""
from __future__ import annotations

import time

import torch

import common
from common import Learner, UserError, config_name


def main(argv: list[str] | None = None) -> None:
    parser = common.make_parser(__doc__)
    common.add_search_flags(parser, draw="cost")
    args = common.parse_arguments(parser, argv, search=True)
    if common.world > 1:
        raise UserError("there is one supernet to train: start it without torchrun, or unset "
                        "WORLD_SIZE")
    common.prepare_torch(args)

    data = common.load_dataset(args)
    space = common.search_space(args, data[0])
    train, validation = common.split_for_search(data[0], args)
    truth = common.read_ground_truth(args.ground_truth, space.configs)
    folder, record = common.open_run("single", args, data)
    if (folder / "result.json").exists():
        return common.report_search(folder, common.load(folder / "result.json"), space, truth)
    common.choose_kernel(args, folder, record, space, data[0])

    network = common.make_network(args, train, True, common.derive_seed(args.seed, "weights", 0))
    learner = Learner(network, args)
    log = []
    counts = torch.zeros(len(space.configs), 1, dtype=torch.int64)  # steps, by configuration
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = common.load(checkpoint)
        learner.load_state_dict(state["learner"])
        log = state["log"]
        counts = state["counts"]

    def evaluate() -> torch.Tensor:
        batches = validation.evaluation_batches(args.batch_size)
        return common.evaluate_configs(network, space.configs, batches, args.amp, args.metric)

    steps = train.num_batches(args.batch_size)
    draw = common.draw_probabilities(space, args.draw)
    print(f"one supernet, epochs {len(log) + 1} to {args.epochs} of {steps} steps:",
          common.describe(args, train, validation, folder), flush=True)
    bar = common.progress(total=args.epochs * steps, initial=len(log) * steps, unit="step")
    for epoch in range(len(log), args.epochs):
        start = time.perf_counter()
        lr = common.cosine(*args.lr, epoch, args.epochs)
        draws, order, crops, checks = (common.generator(args.seed, name, 0, epoch)
                                       for name in ("draws", "order", "crops", "checks"))
        batches = train.passes(args.batch_size, order, crops)
        drawn = torch.multinomial(draw, steps + 10, replacement=True, generator=draws).tolist()
        metrics = []
        for c in drawn[:steps]:
            metrics.append(learner.step(*next(batches), space.configs[c], lr))
            counts[c] += 1
            bar.update()
        metrics = common.read_metrics(metrics, network, epoch + 1)
        loss, train_accuracy = (metrics.sum(0) / steps).tolist()
        seconds = time.perf_counter() - start

        # SPOS validates at its end only. This is a glance: ten batches, a drawn configuration each.
        batches = validation.passes(args.batch_size, checks)
        glances = [learner.validate(*next(batches), space.configs[c]) for c in drawn[steps:]]
        line = {"epoch": epoch + 1, "train_loss": loss, "train_accuracy": train_accuracy,
                "val_accuracy": torch.stack(glances).mean().item(), "lr": lr,
                "seconds": seconds, "images_per_second": len(train) / seconds}
        if args.rank_every and (epoch + 1) % args.rank_every == 0:
            ranking = dict(zip(space.configs, evaluate().tolist()))
            line["ranking"] = {config_name(config): value for config, value in ranking.items()}
            if truth:
                line |= common.rank_metrics(ranking, truth)
        log.append(line)
        common.save(folder / "log.jsonl", log)  # first: a kill between the two loses no line
        common.save(checkpoint, {"learner": learner.state_dict(), "counts": counts, "log": log})
        common.show_epoch(bar, log, args.epochs)
    bar.close()

    accuracies = evaluate()
    common.save(folder / "supernets.pt", [network.state_dict()])
    owners = [0] * len(accuracies)
    result = common.search_result(record, space, accuracies, owners, counts, validation)
    common.report_search(folder, result, space, truth)


if __name__ == "__main__":
    common.run_script(main)
