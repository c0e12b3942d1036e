"""Stage 2a, the baseline: one SuperNet, single-path one-shot (SPOS).

    python search_single.py                      # embedded digits, minutes
    python search_single.py --dataset cifar10    # the paper's protocol

One set of weights for all configurations: every step draws one (--draw) and trains that path. At
the end each configuration is evaluated with the shared weights on the validation half.

Writes runs/single-<dataset>/: config.json, log.jsonl (a line an epoch), checkpoint.pt and the one
before, supernets.pt (the weights), correct.pt (which validation images each configuration gets
right), result.json (the ranking, its uncertainty, the pick), ranking.png. The same command
continues a stopped run.
Source: arXiv:2306.11982, section 3; Guo et al., arXiv:1904.00420.
"""
import torch

from common import (Gauge, Learner, Parser, Run, UserError, config_name, cosine, draw_configs,
                    draw_probabilities, evaluate_configs, expected_time, finish_search,
                    load_dataset, make_network, progress, rank_metrics, read_ground_truth,
                    read_steps, report_search, run_script, search_space, split_for_search, stream,
                    stream_seed, world)


def main() -> None:
    args = Parser(__doc__, search=True).parse_args()
    if world > 1:
        raise UserError("there is one supernet to train: start it without torchrun")
    data = load_dataset(args)
    space = search_space(args, data[0], supernet=True)
    configs, macs = space.configs, space.macs
    names = [config_name(config) for config in configs]
    train, validation = split_for_search(data[0], args)
    truth = read_ground_truth(args.ground_truth, names)
    run = Run("single", args, data)
    if report_search(run, args, truth):
        return

    learner = Learner(make_network(args, train, True, stream_seed(args.seed, "weights", 0)), args)
    supernet = learner.network
    start, state, counts = 0, run.load_checkpoint(), torch.zeros(len(configs), 1, dtype=torch.int64)
    if state:
        start, counts = state["epoch"], state["steps"]
        learner.load_state_dict(state["learner"])
    run.trim_log(lambda line: line["epoch"] <= start)

    steps = train.num_batches(args.batch_size)
    probabilities = draw_probabilities(configs, args.draw, macs)
    mean_macs = sum(p * macs[config] for p, config in zip(probabilities.tolist(), configs))
    expected = expected_time(learner, train, args.batch_size, space,
                             mean_macs * (args.epochs - start) * len(train),
                             space.tree_macs * len(validation))
    print(f"one supernet, {args.arch} on {args.dataset}: {len(train)} training and "
          f"{len(validation)} validation images {train.size}x{train.size}, {train.num_classes} "
          f"classes; {space}; {args.device}, {args.threads} threads\nepochs {start + 1} to "
          f"{args.epochs}, {steps} steps each; expected time {expected}; writing to {run.folder}",
          flush=True)

    gauge = Gauge(args.device)
    bar = progress(total=args.epochs * steps, initial=start * steps, unit="step")
    for epoch in range(start, args.epochs):
        gauge.restart()
        record, lr = [], cosine(*args.lr, epoch, args.epochs)
        draws, order, crops, checks = (stream(args.seed, name, 0, epoch)
                                       for name in ("draws", "order", "crops", "checks"))
        batches = train.passes(args.batch_size, order, crops)
        drawn = draw_configs(probabilities, steps + 10, draws).tolist()
        for step, c in enumerate(drawn[:steps]):
            where = f"epoch {epoch + 1}, step {step + 1}, configuration {names[c]}, supernet 0"
            record.append((where, learner.step(*next(batches), configs[c], lr)))
            gauge.macs += 3 * macs[configs[c]] * len(train) / steps
            counts[c] += 1
            bar.update()

        loss, hit = (read_steps(record, supernet).sum(0) / steps).tolist()
        line = dict(epoch=epoch + 1, **gauge.epoch(len(train)))
        # SPOS validates at its end only: a glance, one draw on each of ten batches
        batches = validation.passes(args.batch_size, checks)
        checked = torch.stack([learner.check(*next(batches), configs[c]) for c in drawn[steps:]])
        line |= dict(train_loss=loss, train_accuracy=hit, val_accuracy=checked.mean().item(),
                     lr=lr)
        bar.set_postfix_str(f"epoch {epoch + 1}, train accuracy {hit:.3f}, "
                            f"utilisation {line['utilisation']:.2f}")
        if args.rank_every and (epoch + 1) % args.rank_every == 0:
            correct = evaluate_configs(supernet, configs,
                                       validation.evaluation_batches(args.batch_size))
            line["ranking"] = dict(zip(names, correct.double().mean(1).tolist()))
            if truth:
                line |= rank_metrics(line["ranking"], truth)
        run.log(**line)
        run.save_checkpoint(epoch=epoch + 1, steps=counts, learner=learner.state_dict())
    bar.close()

    correct = evaluate_configs(supernet, configs, validation.evaluation_batches(args.batch_size))
    run.save("supernets.pt", [supernet.state_dict()])
    finish_search(run, space, correct, [0] * len(configs), counts)
    report_search(run, args, truth)


if __name__ == "__main__":
    run_script(main)
