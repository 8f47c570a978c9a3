"""MART (Wang et al., ICLR 2020) and EW-MART (the rule of Kim et al., 2021, applied to Eq. 7).

    MART      BCE(f(x_adv), y) + beta * KL(f(x) || f(x_adv)) * (1 - p_y(x))
    EW-MART   (1 + w) * BCE(f(x_adv), y) + (beta + w) * KL(f(x) || f(x_adv)) * (1 - p_y(x))
    BCE       CE(f(x_adv), y) - log(1 - max_{k != y} p_k(x_adv))
    w         entropy of f(x_adv) over its batch mean

x_adv maximises the cross-entropy within epsilon of x, from a start of 0.001 Gaussian noise. beta is
the lambda of the paper.

    python train_mart.py --entropy-weight                    # CIFAR-10, PreActResNet-18
    python train_mart.py --dataset digits --entropy-weight   # minutes on a CPU

Departure from the official code, which does not change the loss: the KL is computed from
log-probabilities, not log(p + 1e-12), so its gradient does not vanish where p underflows.
"""
import json
import math
import os
import signal
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import models

ALGORITHM = 'mart'


def batch_mean(values):
    """Mean of values (B,) over the whole batch: over all processes where torch.distributed runs."""
    total = torch.stack([values.sum(), torch.ones_like(values).sum()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total[0] / total[1]


def entropy_weights(logits, tau=1.0):
    """w (B,), each example's entropy over the batch mean (Eq. 1-2); constant to autograd, mean 1.

    logits: (B, K), of the adversarial examples; tau > 0 divides them, and tau = inf gives w = 1,
    as do entropies that are all zero.
    """
    log_p = F.log_softmax(logits.detach() / tau, dim=1)
    entropy = -(log_p.exp() * log_p).sum(1)
    mean = batch_mean(entropy)
    return torch.where(mean == 0, 1.0, entropy / mean)


def random_start(x_natural, epsilon):
    """Where the attack starts: 0.001 of Gaussian noise, whatever epsilon is."""
    return x_natural + 0.001 * torch.randn_like(x_natural)


def attack(model, x_natural, x_adv, y, step_size, epsilon, perturb_steps):
    """Maximises CE(f(x_adv), y) from the start x_adv, in eval mode.

    Returns x_adv, within epsilon of x_natural and in [0, 1].
    """
    model.eval()
    low, high = (x_natural - epsilon).clamp(0, 1), (x_natural + epsilon).clamp(0, 1)
    for _ in range(perturb_steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(x_adv), y, reduction='sum')
        grad, = torch.autograd.grad(loss, x_adv)
        x_adv = (x_adv.detach() + step_size * grad.sign()).clamp(low, high)
    model.train()
    return x_adv.detach().clamp(0, 1)


def example_losses(model, x_natural, x_adv, y, beta=6.0, entropy_weight=False, tau=1.0, w=None):
    """Losses (B,) of Eq. 7, and the w that they take: (B,), or 0; a given w is taken as is."""
    logits, logits_adv = model(x_natural), model(x_adv)
    if w is None:
        w = entropy_weights(logits_adv, tau) if entropy_weight else 0
    p_wrong = F.softmax(logits_adv, dim=1).scatter(1, y[:, None], 0).max(dim=1).values
    # 1.0001 and 1.0000001 are the official code's
    bce = F.cross_entropy(logits_adv, y, reduction='none') - torch.log(1.0001 - p_wrong)
    kl = F.kl_div(F.log_softmax(logits_adv, dim=1), F.log_softmax(logits, dim=1),
                  reduction='none', log_target=True).sum(1)
    p_y = F.softmax(logits, dim=1).gather(1, y[:, None]).squeeze(1)
    return (1 + w) * bce + (beta + w) * kl * (1.0000001 - p_y), w


def mart_loss(model, x_natural, y, optimizer, step_size=0.007, epsilon=0.031, perturb_steps=10,
              beta=6.0, distance='l_inf', entropy_weight=False, tau=1.0):
    """The (EW-)MART loss, a scalar to call .backward() on; called like the official mart_loss.

    x_natural: images (B, C, H, W) in [0, 1], as are step_size and epsilon; y: labels (B,);
    optimizer: for zero_grad() alone, may be None. Leaves the model in train mode.
    Raises ValueError for a distance that is not 'l_inf'.
    """
    if distance != 'l_inf':
        raise ValueError(f"distance '{distance}' is not 'l_inf'")
    start = random_start(x_natural, epsilon)
    x_adv = attack(model, x_natural, start, y, step_size, epsilon, perturb_steps)
    if optimizer is not None:
        optimizer.zero_grad()
    return example_losses(model, x_natural, x_adv, y, beta, entropy_weight, tau)[0].mean()


def add_algorithm_args(parser):
    parser.add_argument('--beta', type=evaluate.non_negative, default=6.0,
                        help="weight of the KL term, MART's lambda, from 0")


def loss_options(args, epoch):
    return dict(beta=args.beta)


# ======== below this line all train_*.py are identical ========
# What a resumed run may be given anew: it leaves the result alone (and --epochs may only grow).
RESUMABLE = ('resume', 'model_dir', 'data_dir', 'epochs', 'log_interval', 'save_freq',
             'save_every_minutes', 'no_cuda')


def parse_args(argv=None):
    """The arguments, complete and checked, and the parser."""
    parser = evaluate.ArgumentParser(description=__doc__, epilog=evaluate.protocol_help())
    group = parser.add_argument_group('algorithm')
    add_algorithm_args(group)
    add = group.add_argument
    add('--entropy-weight', action='store_true',
        help='EWAT: add the entropy weight w to the coefficient of each loss term in x_adv')
    add('--tau', type=evaluate.positive, default=1.0,
        help='temperature of the entropy, above 0; inf: w = 1, the control without entropy')
    add('--epsilon', type=evaluate.unit, help='L-infinity radius, pixels in [0, 1]; by data set')
    add('--step-size', type=evaluate.unit, help='of the attack, e.g. 2/255; by data set')
    add('--num-steps', type=evaluate.count, help='of the attack; by data set')
    evaluate.add_data_args(parser)
    add = parser.add_argument_group('optimisation').add_argument
    add('--arch', help=f'{", ".join(models.ARCHS)}; by data set')
    add('--batch-size', type=evaluate.count, help='of all processes together; by data set')
    add('--epochs', type=evaluate.count, help='by data set')
    add('--lr', type=evaluate.positive_finite, help='learning rate; by data set')
    add('--lr-schedule', choices=('multistep', 'cosine', 'onecycle'), default='multistep')
    add('--lr-warmup', type=evaluate.non_negative, default=0.0, help='epochs of linear rise from 0')
    add('--lr-milestones', type=evaluate.count, nargs='*',
        help='multistep: the epochs after which it is divided by 10; by data set')
    add('--momentum', type=evaluate.non_negative, default=0.9)
    add('--weight-decay', '--wd', type=evaluate.non_negative, help='by data set')
    add('--awp-gamma', type=evaluate.non_negative, default=0.0, help='adversarial weight '
        'perturbation, e.g. 0.005 for TRADES and 0.01 for AT; 0: none')
    add('--awp-warmup', type=evaluate.count_or_zero, default=10, help='epochs before it begins')
    add('--ema', type=evaluate.fraction, metavar='DECAY',
        help='average the weights, e.g. 0.995, and select best.pt by the average')
    models.add_speed_args(parser)
    add = parser.add_argument_group('run').add_argument
    add('--seed', type=evaluate.count_or_zero, default=1)
    add('--model-dir', help='holds no run yet (default: runs/DATASET-[ew-]ALGORITHM-seedSEED)')
    add('--resume', metavar='MODEL_DIR',
        help=f'go on with that run; given anew may be its {", ".join(RESUMABLE[2:])}')
    add('--save-every-minutes', type=evaluate.positive, default=15.0, help='inside an epoch')
    add('--save-freq', type=evaluate.count_or_zero, default=0,
        help='keep epoch-E.pt every N epochs; 0: last.pt and best.pt alone')
    add('--log-interval', type=evaluate.count, default=100, help='steps between two reports')
    add('--test-batch-size', type=evaluate.count, default=512)
    add('--no-cuda', action='store_true', help='train on the CPU')

    args = parser.parse_args(argv)
    try:
        if args.resume:
            saved = models.read_run(args.resume, ALGORITHM)['args'] | {'model_dir': args.resume}
            return parser.parse_resumed(argv, saved, RESUMABLE), parser
        evaluate.fill_protocol(args)
        if 'begin_epoch' in args:  # GAIRAT's
            args.begin_epoch = args.begin_epoch or max(1, args.epochs // 2)
            if args.begin_epoch > args.epochs:
                raise ValueError(f'--begin-epoch {args.begin_epoch} is past epoch {args.epochs}')
    except (ValueError, OSError) as error:
        parser.error(error)
    if args.model_dir is None:
        name = ('ew-' if args.entropy_weight else '') + ALGORITHM
        args.model_dir = os.path.join('runs', f'{args.dataset}-{name}-seed{args.seed}')
    return args, parser


def augment(images):
    """Random crop of images (B, C, H, W) padded by 4, and random flip, each image its own."""
    batch, size, device = len(images), images.shape[-1], images.device
    offset = torch.randint(9, (2, batch, 1), device=device)
    rows, columns = torch.arange(size, device=device) + offset
    flip = torch.rand(batch, 1, device=device) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    images = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    return images[torch.arange(batch, device=device)[:, None, None], rows[:, :, None],
                  columns[:, None, :]].permute(0, 3, 1, 2)


def learning_rate(args, epoch, progress):
    """After `epoch` epochs and the share `progress` of the next."""
    t = (epoch + progress) / args.epochs
    shape = {'multistep': 0.1 ** sum(epoch >= m for m in args.lr_milestones),
             'cosine': (1 + math.cos(math.pi * t)) / 2,
             'onecycle': min(t / 0.4, (1 - t) / 0.6)}[args.lr_schedule]
    return args.lr * shape * min(1, (epoch + progress) / args.lr_warmup if args.lr_warmup else 1)


def train(args, parser):
    device = evaluate.pick_device(args.no_cuda)
    rank, world = models.init_processes(device)  # 0 and 1, unless torchrun started several
    spec = evaluate.DATASETS[args.dataset]
    try:
        evaluate.seed_everything(args.seed)
        model = models.build_model(args.arch, spec['num_classes'], spec['in_channels'])
        data = evaluate.TrainingData(args, device)
        lock = rank == 0 and models.claim_directory(args.model_dir, new=not args.resume)
    except (ValueError, OSError) as error:
        parser.error(error)
    model = models.over_processes(model.to(device, memory_format=torch.channels_last))
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum,
                                weight_decay=args.weight_decay)
    models.accelerate(model, args, world)
    ema = models.copy_of(model) if args.ema else None
    # Where the run stands: epochs done, steps done of the next, their summed loss, seconds, log.
    # Random numbers follow from (seed, epoch, step): there is no random state to keep.
    at = {'epoch': 0, 'step': 0, 'total': 0.0, 'seconds': 0.0, 'log': []}
    if args.resume:
        saved = models.read_run(args.resume, ALGORITHM)
        model.load_state_dict(saved['state_dict'])
        optimizer.load_state_dict(saved['optimizer'])
        if ema:
            ema.load_state_dict(saved['ema_state_dict'])
        at = {name: saved[name] for name in at}
    (epoch, step, total, seconds, log), failure = at.values(), None  # of the last attempt to save
    total = torch.tensor(total, dtype=torch.float64, device=device)
    began, next_save = time.time() - seconds, time.time() + 60 * args.save_every_minutes
    about = {'algorithm': ALGORITHM, 'dataset': args.dataset, 'arch': args.arch,
             'args': vars(args), 'versions': evaluate.versions(device)}
    say = print if rank == 0 else lambda *text, **options: None
    if rank == 0:
        with open(os.path.join(args.model_dir, 'config.json'), 'w') as f:
            json.dump(about | {'command': sys.argv, 'processes': world}, f, indent=1)
    say(f'{ALGORITHM}{" with entropy weights" * args.entropy_weight}: {args.arch}, {args.epochs} '
        f'epochs of {data.images_per_epoch:,} images of {args.dataset}, {world} process(es) on '
        f'{about["versions"]["device"]}; kept in {args.model_dir}; best.pt is selected on the '
        f'{"validation images" if args.val_size else "test images (optimistic)"}', flush=True)

    def save(*names):
        nonlocal failure, next_save
        next_save = time.time() + 60 * args.save_every_minutes
        failure = rank == 0 and models.save_run(args.model_dir, names, about | {
            'epoch': epoch, 'step': step, 'total': total.item(), 'seconds': time.time() - began,
            'log': log, 'state_dict': model.state_dict(), 'optimizer': optimizer.state_dict(),
            'ema_state_dict': ema and ema.state_dict()})

    def leave(status, why):
        parser.exit(status, f'{parser.prog}: {why}\n' if rank == 0 else None)

    def leave_if_asked():
        if models.any_process(stop):
            save('last')
            leave(128 + (stop + [signal.SIGTERM])[0],
                  f'stopped; to go on: python {parser.prog} --resume {args.model_dir}')

    stop = evaluate.catch_signals()
    while epoch < args.epochs:
        evaluate.seed_everything(args.seed, epoch)
        batches = data.draw_epoch()
        entered, finite, start = step, torch.zeros((), device=device), time.time()
        warm_up = step + min(10, (len(batches) - step) // 2)
        bar = tqdm(batches[step:], f'epoch {epoch + 1}/{args.epochs}', unit='batch', leave=False,
                   disable=None if rank == 0 else True)
        for batch in bar:
            lr = learning_rate(args, epoch, (step + 0.5) / len(batches))
            for group in optimizer.param_groups:
                group['lr'] = lr
            # Each process draws for the whole batch and takes its share: the same for any number
            evaluate.seed_everything(args.seed, epoch, step)
            x, y = data.take(batch)
            x, size = evaluate.to_float(augment(x) if data.augmented else x), len(y)
            x_start = random_start(x, args.epsilon)
            x, x_start, y = (t.tensor_split(world)[rank] for t in (x, x_start, y))
            evaluate.seed_everything(args.seed, epoch, step, 1 + rank)  # for dropout

            model.requires_grad_(False)  # saves the attack memory, and gradients if compiled
            adv = attack(model, x, x_start, y, args.step_size, args.epsilon, args.num_steps)
            model.requires_grad_(True)
            # With AWP, first the gradient to move the weights along, then the one to step along
            awp, w, moved = args.awp_gamma > 0 and epoch >= args.awp_warmup, None, ()
            for moving in (True, False) if awp else (False,):
                with models.frozen_statistics(model, moving):
                    losses, w = example_losses(model, x, adv, y, entropy_weight=args.entropy_weight,
                                               tau=args.tau, w=w, **loss_options(args, epoch + 1))
                optimizer.zero_grad()
                (losses.sum() / size).backward()
                loss = models.sum_over_processes(model, losses.detach().sum())
                if moving:
                    moved = models.perturb_weights(model, args.awp_gamma)
            models.restore_weights(moved)
            total += loss
            optimizer.step()
            if ema:
                models.average(ema, model, args.ema * (epoch + step > 0))

            step += 1
            finite += total.isfinite()
            if step == warm_up:
                evaluate.synchronize(device)
                start = time.time()
            report, due = step % args.log_interval == 0, time.time() > next_save
            if report or due or stop or step == len(batches):  # here alone the host waits
                loss = total.item() / min(step * args.batch_size, data.images_per_epoch)
                if not (math.isfinite(loss) and models.all_finite(model)):
                    leave(3, f'the loss or a weight is not finite, epoch {epoch + 1}, step '
                          f'{entered + int(finite) + 1}, learning rate {lr:g}; the last checkpoint '
                          'is untouched. Try a lower --lr, or --no-amp')
                bar.set_postfix(loss=f'{loss:.3f}')
                if report and bar.disable:
                    say(f'epoch {epoch + 1}/{args.epochs}  step {step}/{len(batches)}  '
                        f'loss {loss:.3f}', flush=True)
            if step < len(batches):
                if due:
                    save('last')
                leave_if_asked()
        evaluate.synchronize(device)
        timed = min(step * args.batch_size, data.images_per_epoch) - warm_up * args.batch_size
        speed = timed / (time.time() - start)
        row = {'epoch': epoch + 1, 'lr': lr, 'loss': loss}
        row |= evaluate.evaluate_epoch(model, *data.held_out, args.epsilon, args.test_batch_size,
                                       args.seed, average=ema)
        log.append(row | {'images_per_s': speed, 'seconds': time.time() - began})
        epoch, step = epoch + 1, 0
        total.zero_()
        save('last', *['best'] * (models.best_row(log) is log[-1]),
             *[f'epoch-{epoch}'] * (args.save_freq > 0 and epoch % args.save_freq == 0))
        say(evaluate.describe(log[-1], args.epochs), flush=True)
        if evaluate.is_stuck(log, spec['num_classes']):
            leave(3, 'no better than chance for five epochs; best.pt is from epoch '
                  f'{models.best_row(log)["epoch"]}. Try a lower --lr or --awp-gamma')
        if epoch < args.epochs:
            leave_if_asked()
    if failure:
        leave(1, failure)
    best = models.best_row(log)
    say(f'best epoch {best["epoch"]}: clean {best["clean"]:.2%}, pgd10 {best["pgd10"]:.2%}. Next: '
        f'python evaluate.py --model-path {os.path.join(args.model_dir, "best.pt")}')


def main():
    args, parser = parse_args()
    try:
        train(args, parser)
    except torch.OutOfMemoryError:
        parser.exit(1, f'{parser.prog}: out of GPU memory with {args.arch} at --batch-size '
                    f'{args.batch_size}; a smaller batch, or more processes, need less\n')


if __name__ == '__main__':
    main()
