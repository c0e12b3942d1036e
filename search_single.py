"""Stage 2a, the baseline: one SuperNet, single-path one-shot (SPOS).

    python search_single.py                      # embedded digits, minutes
    python search_single.py --dataset cifar10    # the paper's protocol

One set of weights for all configurations: every step draws one uniformly and trains that path. At
the end each configuration is evaluated with the shared weights on the validation half.

Writes runs/single-<dataset>/: config.json, log.jsonl (a line an epoch), checkpoint.pt,
supernets.pt (the weights), result.json (the ranking and the pick), ranking.png. The same command
continues a stopped run.
Source: arXiv:2306.11982, section 3; Guo et al., arXiv:1904.00420.
"""
import math

import torch
from tqdm import tqdm

from common import (Gauge, Parser, ResNet20, Run, accuracy, config_name, cosine, count_macs,
                    enumerate_configs, evaluate_configs, expected_time, finish_search,
                    load_dataset, make_network, rank_metrics, read_ground_truth, report_search,
                    run_script, shuffled_batches, split_for_search, stream, train_step)


def main() -> None:
    args = Parser(__doc__, search=True).parse_args()
    configs = enumerate_configs(ResNet20.num_layers, len(ResNet20.default_config))
    names = [config_name(config) for config in configs]
    train, _ = load_dataset(args)
    classes, size = train.num_classes, train.images.shape[1]
    train, validation = split_for_search(train, args)
    truth = read_ground_truth(args.ground_truth, configs)
    run = Run("single", args)
    if run.load("result.json"):
        return report_search(run, args, truth)

    supernet = make_network(args, classes, True, 0)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=args.lr[0], momentum=args.momentum,
                                weight_decay=args.weight_decay)
    start, state = 0, run.load("checkpoint.pt")
    if state:
        start = state["epoch"]
        supernet.load_state_dict(state["supernet"])
        optimizer.load_state_dict(state["optimizer"])
    run.trim_log(lambda line: line["epoch"] <= start)

    macs = [count_macs(supernet, config, size) for config in configs]
    steps = math.ceil(len(train) / args.batch_size)
    mean_macs = sum(macs) / len(macs)
    expected = expected_time(supernet, train, args.batch_size,
                             mean_macs * (args.epochs - start) * len(train),
                             mean_macs * len(configs) * len(validation))
    print(f"one supernet on {args.dataset}: {len(train)} training and {len(validation)} validation "
          f"images {size}x{size}, {classes} classes; {len(configs)} configurations; "
          f"{sum(p.numel() for p in supernet.parameters()):,} parameters; {args.device}, "
          f"{args.threads} threads\nepochs {start + 1} to {args.epochs}, {steps} steps each; "
          f"expected time {expected}; writing to {run.folder}", flush=True)

    gauge = Gauge(args.device)
    bar = tqdm(total=args.epochs * steps, initial=start * steps, disable=None, unit="step")
    for epoch in range(start, args.epochs):
        totals = torch.zeros(2, dtype=torch.float64)
        gauge.restart()
        lr = cosine(*args.lr, epoch, args.epochs)
        optimizer.param_groups[0]["lr"] = lr
        draws, crops, order, checks = (stream(args.seed, name, 0, epoch)
                                       for name in ("draws", "crops", "orders", "checks"))
        for step, index in enumerate(shuffled_batches(len(train), args.batch_size, order)):
            c = torch.randint(len(configs), (), generator=draws).item()
            images, labels = train.batch(index, crops)
            where = f"epoch {epoch + 1}, step {step + 1}, configuration {names[c]}, supernet 0"
            batch = train_step(supernet, optimizer, images, labels, configs[c], where)
            totals += torch.tensor(batch, dtype=torch.float64)
            gauge.macs += 3 * macs[c] * len(index)
            bar.set_postfix_str(f"epoch {epoch + 1}, train accuracy {batch[1]:.3f}, "
                                f"utilisation {gauge.utilisation:.2f}", False)
            bar.update()

        line = dict(epoch=epoch + 1, **gauge.epoch(len(train)))
        checked = []  # SPOS validates at its end only: a glance, one draw on each of ten batches
        with torch.inference_mode():
            for index in shuffled_batches(len(validation), args.batch_size, checks)[:10]:
                c = torch.randint(len(configs), (), generator=checks).item()
                images, labels = validation.batch(index)
                checked.append(accuracy(supernet(images, configs[c]), labels))
        loss, hit = (totals / steps).tolist()
        line |= dict(train_loss=loss, train_accuracy=hit,
                     val_accuracy=sum(checked) / len(checked), lr=lr)
        if args.rank_every and (epoch + 1) % args.rank_every == 0:
            found = evaluate_configs(supernet, configs,
                                     validation.evaluation_batches(args.batch_size))
            line["ranking"] = dict(zip(names, found.tolist()))
            if truth:
                line |= rank_metrics(line["ranking"], truth)
        run.log(**line)
        run.save("checkpoint.pt", {"epoch": epoch + 1, "supernet": supernet.state_dict(),
                                   "optimizer": optimizer.state_dict()})
    bar.close()

    accuracies = evaluate_configs(supernet, configs,
                                  validation.evaluation_batches(args.batch_size))
    run.save("supernets.pt", [supernet.state_dict()])
    finish_search(run, configs, accuracies, [0] * len(configs), macs)
    report_search(run, args, truth)


if __name__ == "__main__":
    run_script(main)
