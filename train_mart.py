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
import torch
import torch.nn.functional as F


def batch_mean(values):
    """Mean of values (B,) over the whole batch: over all processes where torch.distributed runs."""
    total = torch.stack([values.sum(), torch.ones_like(values).sum()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total[0] / total[1]


def entropy_weights(logits, tau=1.0):
    """w (B,), each example's entropy over the batch mean (Eq. 1-2); constant to autograd, mean 1.

    logits: (B, K), of the adversarial examples, -inf for a class that is left out; tau > 0 divides
    them, and tau = inf gives w = 1, as do entropies that are all zero. Where torch.distributed
    runs, the mean is over all processes: call it in all of them or in none.
    """
    z = logits.detach() - logits.detach().amax(dim=1, keepdim=True)
    z = z.clamp(min=torch.finfo(z.dtype).min) / max(tau, 1e-30)  # finite also for -inf / inf
    log_p = F.log_softmax(z, dim=1).clamp(min=-1e4)  # finite where p is 0: 0 log 0 = 0
    entropy = -(log_p.exp() * log_p).sum(1)
    mean = batch_mean(entropy)
    return torch.where(mean == 0, 1.0, entropy / mean)


def check_images(x):
    """ValueError for images that are not in [0, 1], which an attack would clamp without a word."""
    if not ((x >= -1e-3) & (x <= 1.001)).all():
        raise ValueError('x_natural is not in [0, 1]: normalize inside the model, not before')


def check_logits(logits):
    """ValueError for a model that does not give each class a logit."""
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f'the model gives {tuple(logits.shape)}, not logits (B, K), K at least 2')


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


def mart_loss(model, x_natural, y, optimizer, step_size=0.007, epsilon=0.031, perturb_steps=10,
              beta=6.0, distance='l_inf', entropy_weight=False, tau=1.0, adv=None,
              reduction='mean'):
    """The (EW-)MART loss (Eq. 7), a scalar to call .backward() on; called like the official.

    x_natural: images (B, C, H, W) in [0, 1], as are step_size and epsilon; y: labels (B,);
    optimizer: for zero_grad() alone, before the loss: None to accumulate gradients; adv: what
    attack() returned, where it was called before; reduction: 'mean' or 'sum' over
    the batch. Leaves the whole model in train mode, frozen batch normalization too.
    Raises ValueError for a distance that is not 'l_inf', images outside [0, 1], other labels, and a
    model of one logit.
    """
    if distance != 'l_inf':
        raise ValueError(f"distance '{distance}' is not 'l_inf'")
    if y.dim() != 1 or y.is_floating_point():
        raise ValueError(f'y is {y.dtype} {tuple(y.shape)}, not labels (B,)')
    if adv is None:
        check_images(x_natural)
        start = random_start(x_natural, epsilon)
        adv = attack(model, x_natural, start, y, step_size, epsilon, perturb_steps)
    if optimizer is not None:
        optimizer.zero_grad()
    logits, logits_adv = model(x_natural), model(adv)
    check_logits(logits_adv)
    w = entropy_weights(logits_adv, tau) if entropy_weight else 0
    p_wrong = F.softmax(logits_adv, dim=1).scatter(1, y.long()[:, None], 0).max(dim=1).values
    # 1.0001 and 1.0000001 are the official code's
    bce = F.cross_entropy(logits_adv, y, reduction='none') - torch.log(1.0001 - p_wrong)
    kl = F.kl_div(F.log_softmax(logits_adv, dim=1), F.log_softmax(logits, dim=1),
                  reduction='none', log_target=True).sum(1)
    p_y = F.softmax(logits, dim=1).gather(1, y.long()[:, None]).squeeze(1)
    losses = (1 + w) * bce + (beta + w) * kl * (1.0000001 - p_y)
    return losses.sum() if reduction == 'sum' else losses.mean()


def add_algorithm_args(parser, real, whole):
    parser.add_argument('--beta', type=real('[0, inf)'), default=6.0,
                        help="weight of the KL term, MART's lambda, from 0")


def loss_options(args, epoch):
    return dict(beta=args.beta)


ALGORITHM, loss_function = 'mart', mart_loss


# ======== below this line all train_*.py are identical ========
import math

import bookkeeping
import commands
import data
import evaluate
import models
from commands import pixels, real, whole


def parse_args(argv=None):
    """The arguments, complete and checked."""
    parser = commands.ArgumentParser(description=__doc__, epilog=data.protocol_help())
    group = parser.add_argument_group('algorithm')
    add_algorithm_args(group, real, whole)
    add = group.add_argument
    add('--entropy-weight', action='store_true',
        help='EWAT: add the entropy weight w to the coefficient of each loss term in x_adv')
    add('--tau', type=real('(0, inf]'), default=1.0,
        help='temperature of the entropy, above 0; inf: w = 1, the control without entropy')
    add('--epsilon', type=pixels, help='L-infinity radius, pixels in [0, 1]; by data set')
    add('--step-size', type=pixels, help='of the attack, e.g. 2/255; by data set')
    add('--num-steps', type=whole(1), help='of the attack; by data set')
    data.add_data_args(parser)
    add = parser.add_argument_group('optimisation').add_argument
    add('--arch', type=models.full_arch, help=f'{models.KNOWN_ARCHS}; by data set')
    add('--init-from', metavar='FILE', help='start from these weights, any that evaluate.py loads')
    add('--batch-size', type=whole(1), help='of all processes together; by data set')
    add('--epochs', type=whole(1), help='by data set')
    add('--lr', type=real('(0, inf)'), help='learning rate; by data set')
    add('--lr-schedule', choices=('multistep', 'cosine', 'onecycle'), default='multistep')
    add('--lr-warmup', type=real('[0, inf)'), default=0.0, help='epochs of linear rise from 0')
    add('--lr-milestones', type=whole(1), nargs='*',
        help='multistep: the epochs after which it is divided by 10; by data set')
    add('--momentum', type=real('[0, inf)'), default=0.9)
    add('--weight-decay', '--wd', type=real('[0, inf)'), help='by data set')
    add('--awp-gamma', type=real('[0, inf)'), default=0.0, help='adversarial weight '
        'perturbation, e.g. 0.005 for TRADES and 0.01 for AT; 0: none')
    add('--awp-warmup', type=whole(0), default=10, help='epochs before it begins')
    add('--ema', type=real('(0, 1)'), metavar='DECAY',
        help='average the weights, e.g. 0.995, and select best.pt by the average')
    models.add_speed_args(parser)
    bookkeeping.add_run_args(parser)
    args = bookkeeping.complete_args(parser, argv, ALGORITHM)
    loss_options(args, epoch=0)  # raises ValueError where they do not fit
    return args


def learning_rate(args, epochs_done):
    """After a number of epochs that need not be whole."""
    progress = epochs_done / args.epochs
    if args.lr_schedule == 'cosine':
        lr = args.lr * (1 + math.cos(math.pi * progress)) / 2
    elif args.lr_schedule == 'onecycle':
        lr = args.lr * min(progress / 0.4, (1 - progress) / 0.6)
    else:
        lr = args.lr * 0.1 ** sum(epochs_done >= m for m in args.lr_milestones)
    return lr * min(1, epochs_done / args.lr_warmup) if args.lr_warmup else lr


def train(args):
    with commands.mistakes():
        run = bookkeeping.Run(args, ALGORITHM)
        images = data.TrainingData(args, run.device)
        commands.seed_everything(args.seed)
        model = models.build_model(args.arch, images.num_classes, images.shape[0],
                                   init_from=None if args.resume else args.init_from)
        model = bookkeeping.same_everywhere(
            model.to(run.device, memory_format=torch.channels_last))
        optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum,
                                    weight_decay=args.weight_decay, fused=run.device.type == 'cuda')
        models.accelerate(model, args, run.world)
        ema = models.copy_of(model) if args.ema else None
        run.begin(images, model, optimizer, ema)

    for epoch in range(run.epoch, args.epochs):
        commands.seed_everything(args.seed, epoch)
        batches = images.draw_epoch()
        for step in run.steps(len(batches)):
            for group in optimizer.param_groups:
                group['lr'] = learning_rate(args, epoch + (step + 0.5) / len(batches))
            # Each process draws for the whole batch and takes its share: the same for any number
            commands.seed_everything(args.seed, epoch, step)
            x, y = images.take(batches[step])
            batch_size = len(y)
            x, x_start, y = run.share(x, random_start(x, args.epsilon), y)
            commands.seed_everything(args.seed, epoch, step, 1 + run.rank)  # for dropout

            with models.frozen(model):
                adv = attack(model, x, x_start, y, args.step_size, args.epsilon, args.num_steps)
            loss_args = dict(model=model, x_natural=x, y=y, optimizer=optimizer, adv=adv,
                             perturb_steps=args.num_steps, entropy_weight=args.entropy_weight,
                             tau=args.tau, reduction='sum', **loss_options(args, epoch))
            perturbing = args.awp_gamma > 0 and epoch >= args.awp_warmup
            if perturbing:
                with models.frozen_statistics(model):
                    run.backward(loss_function(**loss_args), batch_size)
                unperturbed = models.perturb_weights(model, args.awp_gamma)
            loss = run.backward(loss_function(**loss_args), batch_size)
            if perturbing:
                models.restore_weights(unperturbed)
            optimizer.step()
            if ema:  # the weights before the first step do not count
                models.average(ema, model, args.ema if epoch or step else 0)
            run.after_step(loss)
        run.after_epoch(evaluate.evaluate_epoch(model, *images.held_out, args.epsilon,
                                                args.test_batch_size, args.seed, average=ema))
    run.finish()


def main():
    with commands.exit_status():
        with commands.mistakes():
            args = parse_args()
        train(args)


if __name__ == '__main__':
    main()
