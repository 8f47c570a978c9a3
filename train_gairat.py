"""GAIRAT (Zhang et al., ICLR 2021) and EW-GAIRAT (the rule of Kim et al., 2021, applied to Eq. 8).

    GAIRAT      gamma_hat * CE(f(x_adv), y),   gamma = (1 + tanh(psi + 5 (1 - 2 kappa / K))) / 2 over its batch mean
    EW-GAIRAT   (gamma_hat + w) * CE(f(x_adv), y),   w = entropy of f(x_adv) / its batch mean

x_adv maximises the cross-entropy within epsilon of x in K steps, from a uniform random start; kappa counts the
iterates, from the start to the last but one, that are still classified correctly: few means fragile, and weighs much.
Before --begin-epoch, psi = inf: all gamma_hat are 1.

    python train_gairat.py --entropy-weight                    # CIFAR-10, PreActResNet-18
    python train_gairat.py --dataset digits --entropy-weight   # two minutes on a CPU, no download

Departures from the official code, none of which changes the loss: kappa is counted on the device, and the attack
computes no gradients of the weights.
"""
import csv
import json
import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import models

ALGORITHM = 'gairat'


def batch_mean(values):
    """Mean of values (B,) over the whole batch: where torch.distributed runs, over the shares of all processes."""
    total = torch.stack([values.sum(), torch.ones_like(values).sum()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total[0] / total[1]


def entropy_weights(logits, tau=1.0):
    """w (B,): each example's predictive entropy over its batch mean (Eq. 1-2), a constant to autograd.

    logits: (B, K) of the adversarial examples; tau > 0 divides them, and tau = inf gives w = 1.
    w averages 1 over the batch; it is 1 as well where every entropy is zero.
    """
    log_p = F.log_softmax(logits.detach() / tau, dim=1)
    entropy = -(log_p.exp() * log_p).sum(1)
    mean = batch_mean(entropy)
    return torch.where(mean > 0, entropy / mean, 1.0)


def random_start(x_natural, epsilon):
    """Where the attack starts: a uniform point of the ball that is an image."""
    return (x_natural + torch.empty_like(x_natural).uniform_(-epsilon, epsilon)).clamp(0, 1)


def gairat_weights(kappa, num_steps, psi=-1.0):
    """gamma_hat (B,) of Eq. 8, with batch mean 1, from kappa (B,) in [0, num_steps].

    psi: any number; inf gives 1 for all, and so does a psi so low that every gamma underflows to 0.
    """
    gamma = (1 + torch.tanh(psi + 5 * (1 - 2 * kappa / num_steps))) / 2
    mean = batch_mean(gamma)
    return torch.where(mean > 0, gamma / mean, 1.0)


def attack(model, x_natural, x_adv, y, step_size, epsilon, perturb_steps):
    """PGD (Eq. 4): maximises CE(f(x_adv), y), from the start x_adv, in eval mode.

    Returns (x_adv, kappa): x_adv within epsilon of x_natural and in [0, 1]; kappa (B,) in [0, perturb_steps].
    """
    model.eval()
    kappa = torch.zeros_like(y, dtype=x_natural.dtype)
    for _ in range(perturb_steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            logits = model(x_adv)
            loss = F.cross_entropy(logits, y, reduction='sum')
        kappa += logits.argmax(1) == y
        grad, = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + step_size * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x_natural - epsilon), x_natural + epsilon).clamp(0, 1)
    model.train()
    return x_adv.detach().clamp(0, 1), kappa


def example_losses(model, x_natural, adv, y, num_steps, psi=-1.0, entropy_weight=False, tau=1.0, w=None):
    """Each example's loss (B,), and its entropy weight w (B,), or 0 without: Eq. 8. A w given is used as it is.

    adv: the attack's (x_adv, kappa).
    """
    x_adv, kappa = adv
    logits_adv = model(x_adv)
    if w is None:
        w = entropy_weights(logits_adv, tau) if entropy_weight else 0
    return (gairat_weights(kappa, num_steps, psi) + w) * F.cross_entropy(logits_adv, y, reduction='none'), w


def gairat_loss(model, x_natural, y, optimizer, step_size=0.007, epsilon=0.031, perturb_steps=10, psi=-1.0,
                entropy_weight=False, tau=1.0):
    """The scalar (EW-)GAIRAT loss to call .backward() on.

    x_natural: images (B, C, H, W) in [0, 1]; y: labels (B,); step_size, epsilon: in the units of the images;
    optimizer: for zero_grad() only, may be None. Leaves the model in train mode.
    """
    adv = attack(model, x_natural, random_start(x_natural, epsilon), y, step_size, epsilon, perturb_steps)
    if optimizer is not None:
        optimizer.zero_grad()
    return example_losses(model, x_natural, adv, y, perturb_steps, psi, entropy_weight, tau)[0].mean()


def add_algorithm_args(parser):
    parser.add_argument('--psi', '--Lambda', type=evaluate.number, default=-1.0, metavar='P',
                        help='shifts the weights: the higher, the more equal; inf: all 1 (default: -1.0)')
    parser.add_argument('--begin-epoch', type=evaluate.count, metavar='E',
                        help='the first epoch with weights, from 1 (default: half of the epochs)')


def loss_options(args, epoch):
    return dict(num_steps=args.num_steps, psi=args.psi if epoch >= args.begin_epoch else math.inf)


# ======== below this line all train_*.py are identical ========
# What the paper's protocol sets by data set. digits is ours: all eight methods learn it in 15 epochs.
CIFAR = dict(arch='preactresnet18', epochs=110, lr=0.1, lr_milestones=[100, 105], weight_decay=5e-4, batch_size=128,
             step_size=2 / 255, num_steps=10)
PROTOCOL = {
    'cifar10': CIFAR,
    'cifar100': CIFAR,
    'mnist': dict(arch='smallcnn', epochs=100, lr=0.01, lr_milestones=[20, 40], weight_decay=1e-4, batch_size=128,
                  step_size=0.01, num_steps=40),
    'digits': dict(arch='smallcnn', epochs=15, lr=0.02, lr_milestones=[11, 14], weight_decay=1e-4, batch_size=64,
                   step_size=0.025, num_steps=10),
}
for name, values in PROTOCOL.items():
    values['epsilon'] = evaluate.DATASETS[name]['epsilon']


def parse_args(argv=None):
    """The arguments, complete and checked, and the parser; a mistake ends the program with one line and status 2."""
    protocol = '\n'.join(f'  {name}: {", ".join(f"{k} {v}" for k, v in values.items())}'
                         for name, values in PROTOCOL.items())
    parser = evaluate.ArgumentParser(
        description=__doc__, epilog=f"The protocol of the paper (digits: ours), by data set:\n{protocol}\n"
        "With other --epochs, the milestones keep their share of the run.")
    group = parser.add_argument_group('algorithm')
    add_algorithm_args(group)
    group.add_argument('--entropy-weight', action='store_true',
                       help="add each example's entropy weight w to the coefficient of its adversarial loss (EWAT)")
    group.add_argument('--tau', type=evaluate.positive, default=1.0, metavar='T',
                       help='temperature of the entropy, above 0; inf: w = 1 for all, the control (default: 1)')
    group.add_argument('--epsilon', type=evaluate.unit, metavar='E',
                       help='L-infinity radius of the attack, pixels in [0, 1], e.g. 8/255 (default: by data set)')
    group.add_argument('--step-size', type=evaluate.unit, metavar='A', help='step of the attack (default: by data set)')
    group.add_argument('--num-steps', type=evaluate.count, metavar='K', help='steps of the attack (default: by data set)')

    group = parser.add_argument_group('data')
    group.add_argument('--dataset', choices=evaluate.DATASETS, default='cifar10', help='default: cifar10')
    group.add_argument('--data-dir', default='./data', metavar='DIR',
                       help='where the data set is, or is downloaded to (default: ./data); digits needs none')
    group.add_argument('--train-size', type=evaluate.count, metavar='N', help='only the first N training images')
    group.add_argument('--test-size', type=evaluate.count, metavar='N', help='only the first N test images')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--arch', metavar='NAME', help=f'{", ".join(models.ARCHS)} (default: by data set)')
    group.add_argument('--batch-size', type=evaluate.count, metavar='N', help='default: by data set')
    group.add_argument('--epochs', type=evaluate.count, metavar='N', help='default: by data set')
    group.add_argument('--lr', type=evaluate.positive_finite, metavar='LR', help='learning rate (default: by data set)')
    group.add_argument('--lr-milestones', type=evaluate.count, nargs='*', metavar='E',
                       help='divide the learning rate by 10 once E epochs are done, for each E (default: by data set)')
    group.add_argument('--momentum', type=evaluate.non_negative, default=0.9, metavar='M', help='of SGD (default: 0.9)')
    group.add_argument('--weight-decay', '--wd', type=evaluate.non_negative, metavar='W', help='default: by data set')

    group = parser.add_argument_group('run')
    group.add_argument('--seed', type=evaluate.count_or_zero, default=1, metavar='S', help='default: 1')
    group.add_argument('--model-dir', metavar='DIR', help='default: runs/DATASET-ALGORITHM-seedS; must hold no run yet')
    group.add_argument('--test-batch-size', type=evaluate.count, default=512, metavar='N', help='default: 512')
    group.add_argument('--log-interval', type=evaluate.count, default=100, metavar='N',
                       help='batches between two reports of the loss (default: 100)')
    group.add_argument('--save-freq', type=evaluate.count_or_zero, default=0, metavar='N',
                       help='keep epoch-E.pt every N epochs, beside last.pt and best.pt (default: 0, none)')
    group.add_argument('--no-cuda', action='store_true', help='train on the CPU')

    args = parser.parse_args(argv)
    protocol = dict(PROTOCOL[args.dataset])
    if args.epochs is not None:
        share = args.epochs / protocol['epochs']
        protocol['lr_milestones'] = [math.ceil(m * share) for m in protocol['lr_milestones']]
    if args.lr_milestones is not None and args.lr_milestones != sorted(set(args.lr_milestones)):
        parser.error(f'--lr-milestones {args.lr_milestones} do not rise')
    for name, value in protocol.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if 'begin_epoch' in args:  # GAIRAT's
        args.begin_epoch = args.begin_epoch or max(1, args.epochs // 2)
        if args.begin_epoch > args.epochs:
            parser.error(f'--begin-epoch {args.begin_epoch} is past the end, epoch {args.epochs}')
    if args.model_dir is None:
        name = ('ew-' if args.entropy_weight else '') + ALGORITHM
        args.model_dir = os.path.join('runs', f'{args.dataset}-{name}-seed{args.seed}')
    return args, parser


def augment(images):
    """Random crop of the images (B, C, H, W) padded by 4, and random horizontal flip, each image its own."""
    size, batch, device = images.shape[-1], len(images), images.device
    offset = torch.randint(0, 9, (2, batch, 1), device=device)
    rows, columns = torch.arange(size, device=device) + offset
    columns = torch.where(torch.rand(batch, 1, device=device) < 0.5, columns.flip(1), columns)
    images = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    return images[torch.arange(batch, device=device)[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def learning_rate(args, epoch):
    """After `epoch` epochs are done."""
    return args.lr * 0.1 ** sum(epoch >= m for m in args.lr_milestones)


def train_epoch(model, optimizer, images, labels, args, epoch):
    """One pass over the images; returns the mean loss and the images per second, the first batches left out.

    All random numbers of a step come from (seed, epoch, step), so they need no saving to go on from.
    """
    device = images.device
    evaluate.seed_everything(args.seed, epoch)
    batches = torch.randperm(len(images), device=device).split(args.batch_size)
    warm_up = min(10, len(batches) // 2)
    total = torch.zeros((), dtype=torch.float64, device=device)
    bar = tqdm(batches, desc=f'epoch {epoch}/{args.epochs}', unit='batch', leave=False, disable=None)
    for step, index in enumerate(bar):
        if step == warm_up:
            evaluate.synchronize(device)
            start, timed = time.time(), 0
        evaluate.seed_everything(args.seed, epoch, step)
        x, y = images[index], labels[index]
        x = evaluate.to_float(augment(x) if args.dataset.startswith('cifar') else x)
        x_adv = attack(model, x, random_start(x, args.epsilon), y, args.step_size, args.epsilon, args.num_steps)
        optimizer.zero_grad()
        losses, _ = example_losses(model, x, x_adv, y, entropy_weight=args.entropy_weight, tau=args.tau,
                                   **loss_options(args, epoch))
        losses.mean().backward()
        optimizer.step()
        total += losses.detach().sum()
        timed = timed + len(y) if step >= warm_up else 0
        if (step + 1) % args.log_interval == 0:
            loss = total.item() / ((step + 1) * args.batch_size)
            bar.set_postfix(loss=f'{loss:.3f}')
            if bar.disable:
                print(f'epoch {epoch}/{args.epochs}  batch {step + 1}/{len(batches)}  loss {loss:.3f}', flush=True)
    evaluate.synchronize(device)
    return total.item() / len(images), timed / (time.time() - start)


def main():
    args, parser = parse_args()
    device = evaluate.pick_device(args.no_cuda)
    try:
        evaluate.check_fit(args.dataset, args.arch)
        evaluate.seed_everything(args.seed)
        spec = evaluate.DATASETS[args.dataset]
        model = models.build_model(args.arch, spec['num_classes'], spec['in_channels'])
        images, labels = evaluate.load_data(args.dataset, args.data_dir, True, args.train_size, device)
        test_images, test_labels = evaluate.load_data(args.dataset, args.data_dir, False, args.test_size, device)
        os.makedirs(args.model_dir, exist_ok=True)
        if os.listdir(args.model_dir):
            raise ValueError(f'{args.model_dir} already holds a run; choose another --model-dir')
        with open(os.path.join(args.model_dir, 'config.json'), 'w') as f:
            json.dump({'algorithm': ALGORITHM, 'args': vars(args), 'command': sys.argv,
                       'versions': evaluate.versions(device)}, f, indent=1)
    except (ValueError, OSError) as error:
        parser.error(error)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    print(f'{"EW-" if args.entropy_weight else ""}{ALGORITHM.upper()}, {args.arch} on {len(images):,} images of '
          f'{args.dataset}, {args.epochs} epochs, on {evaluate.versions(device)["device"]}; all goes to {args.model_dir}')

    log = []  # a dict an epoch, the rows of log.csv
    began = time.time()
    for epoch in range(1, args.epochs + 1):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(args, epoch - 1)
        loss, speed = train_epoch(model, optimizer, images, labels, args, epoch)
        row = {'epoch': epoch, 'lr': group['lr'], 'loss': loss}
        row |= evaluate.evaluate_epoch(model, test_images, test_labels, args.epsilon, args.test_batch_size, args.seed)
        log.append(row | {'images_per_s': speed, 'seconds': time.time() - began})
        left = (args.epochs - epoch) * (time.time() - began) / epoch
        print(f"epoch {epoch}/{args.epochs}  lr {row['lr']:.3g}  loss {loss:.3f}  clean {row['clean']:.2%}  "
              f"pgd10 {row['pgd10']:.2%}  entropy {row['entropy']:.2f} ({row['high_entropy']:.1%} above 1.5)  "
              f"{speed:,.0f} images/s  {left / 60:.0f} min left", flush=True)

        best = max(log, key=lambda row: row['pgd10'])
        checkpoint = {'state_dict': model.state_dict(), 'arch': args.arch, 'dataset': args.dataset,
                      'algorithm': ALGORITHM, 'args': vars(args), 'epoch': epoch, 'log': log}
        names = ['last'] + ['best'] * (best is log[-1]) + [f'epoch-{epoch}'] * (args.save_freq > 0 == epoch % max(1, args.save_freq))
        for name in names:
            models.save_checkpoint(checkpoint, os.path.join(args.model_dir, f'{name}.pt'))
        with open(os.path.join(args.model_dir, 'log.csv'), 'w', newline='') as f:
            writer = csv.DictWriter(f, log[0])
            writer.writeheader()
            writer.writerows(log)
    print(f"best epoch {best['epoch']}: clean {best['clean']:.2%}, pgd10 {best['pgd10']:.2%}, after "
          f"{time.time() - began:.0f} s. Evaluate it: python evaluate.py --model-path {args.model_dir}/best.pt")


if __name__ == '__main__':
    main()
