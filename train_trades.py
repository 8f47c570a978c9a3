"""TRADES (Zhang et al., ICML 2019) and EW-TRADES (Kim et al., 2021, Eq. 11).

    TRADES      CE(f(x), y) + beta * KL(f(x) || f(x_adv))
    EW-TRADES   CE(f(x), y) + (beta + w) * KL(f(x) || f(x_adv))
    w           entropy of f(x_adv), divided by its batch mean

x_adv maximizes the KL divergence within epsilon of x, from x plus Gaussian noise (sd 0.001).

    python train_trades.py --entropy-weight --beta 5.5                    # CIFAR-10, one GPU
    python train_trades.py --entropy-weight --beta 5.5 --dataset digits   # minutes on a CPU

The loss equals the official code's but is computed faster: clean images are forwarded once per
attack and once per loss, not at every attack step and twice in the loss. The KL is computed from
log-probabilities, so its gradient stays finite where the softmax underflows to zero. Consequences:
batch normalization updates its statistics twice per step, not three times; and in float32 the signs
of the first attack steps, which are rounding noise, differ from the official ones.
"""
import torch
import torch.nn.functional as F


def to_float32(values):
    """The values in float32 at least, because sums in half precision would overflow."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def over_batch_mean(values):
    """values (B,) / their mean over the batch and all processes, which must all call this."""
    total = torch.stack([values.sum(), torch.ones_like(values).sum()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    mean = total[0] / total[1]
    return torch.where(mean == 0, 1.0, values / mean)


def entropy_weights(logits, tau=1.0):
    """w (B,): the entropy of each example divided by the batch mean (Eq. 1-2); no gradient, mean 1.

    logits: (B, K) of the adversarial examples; -inf excludes a class. tau > 0 divides the logits
    inside the entropy; tau = inf gives w = 1. Raises ValueError unless tau > 0. The mean is taken
    over all processes of torch.distributed, which must all call this.
    """
    if not tau > 0:
        raise ValueError(f'tau must be above 0, not {tau}')
    z = to_float32(logits.detach())
    z = z - z.amax(dim=1, keepdim=True)
    z = z.clamp(min=torch.finfo(z.dtype).min) / max(tau, 1e-30)  # finite also for -inf / inf
    log_p = F.log_softmax(z, dim=1).clamp(min=-1e4)  # so that 0 log 0 = 0
    return over_batch_mean(-(log_p.exp() * log_p).sum(1))


def random_start(x_natural, epsilon):
    """Where the attack starts: x_natural plus Gaussian noise, whatever epsilon is."""
    return x_natural + 0.001 * torch.randn_like(x_natural)


def attack(model, x_natural, x_adv, y, step_size, epsilon, perturb_steps):
    """PGD from x_adv in eval mode (Eq. 6); the result is in [0, 1], within epsilon of x_natural."""
    model.eval()
    # not under no_grad(), or autocast in torch 2.4 would cache weights that receive no gradient
    log_p = F.log_softmax(model(x_natural), dim=1).detach()
    low, high = (x_natural - epsilon).clamp(0, 1), (x_natural + epsilon).clamp(0, 1)
    for _ in range(perturb_steps):
        x_adv = x_adv.detach().requires_grad_()
        log_q = F.log_softmax(model(x_adv), dim=1)
        kl = F.kl_div(log_q, log_p, reduction='sum', log_target=True)
        grad, = torch.autograd.grad(kl, x_adv)
        x_adv = (x_adv.detach() + step_size * grad.sign()).clamp(low, high)
    model.train()
    return x_adv.detach().clamp(0, 1)


def trades_loss(model, x_natural, y, optimizer, step_size=0.003, epsilon=0.031, perturb_steps=10,
                beta=1.0, distance='l_inf', entropy_weight=False, tau=1.0, adv=None,
                reduction='mean'):
    """The (EW-)TRADES loss (Eq. 6, 11), a scalar; called like the official function.

    x_natural: images (B, C, H, W) in [0, 1], like step_size and epsilon; y: labels (B,) or
    probabilities (B, K). optimizer: only used for zero_grad(); may be None. adv: the result of
    attack(), if it was called before. reduction: 'mean' or 'sum' over the batch. Leaves the model
    in train mode. Raises ValueError if the images or the lengths are not in [0, 1].
    """
    if distance != 'l_inf':
        raise ValueError(f"distance '{distance}' is not 'l_inf'")
    if adv is None:
        valid = ((x_natural >= -1e-3) & (x_natural <= 1.001)).all()
        if not (valid and 0 <= epsilon <= 1 and 0 <= step_size <= 1):
            raise ValueError('x_natural, epsilon and step_size must be in [0, 1]: normalize inside '
                             'the model and write 8/255')
        start = random_start(x_natural, epsilon)
        adv = attack(model, x_natural, start, y, step_size, epsilon, perturb_steps)
    if optimizer is not None:
        optimizer.zero_grad()
    logits, logits_adv = to_float32(model(x_natural)), to_float32(model(adv))
    w = entropy_weights(logits_adv, tau) if entropy_weight else 0
    kl = F.kl_div(F.log_softmax(logits_adv, dim=1), F.log_softmax(logits, dim=1),
                  reduction='none', log_target=True).sum(1)
    losses = F.cross_entropy(logits, y, reduction='none') + (beta + w) * kl
    return {'mean': losses.mean, 'sum': losses.sum}[reduction]()


def add_algorithm_args(parser):
    parser.add_argument('--beta', type=float, default=6.0,
                        help='weight of the KL term; the paper uses 5.5 for EW-TRADES')


def loss_options(args, epoch):
    return dict(beta=args.beta)


ALGORITHM, loss_function = 'trades', trades_loss


# ======== below this line all train_*.py are identical ========
import argparse
import atexit
import contextlib
import copy
import io
import json
import math
import os
import signal
import sys
import time

import torch.distributed as dist
from tqdm import tqdm

import data
import models


def parse_args(argv):
    """The content of last.pt, or {} without --resume; and the flags. Raises OSError, ValueError."""
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=data.HelpFormatter, epilog='Add --dataset NAME to see its defaults.')
    add = parser.add_argument
    add_algorithm_args(parser)
    add('--entropy-weight', action='store_true', help='EWAT: weight the loss on x_adv by entropy')
    add('--tau', type=float, default=1.0, help='temperature of the entropy; inf: control, w = 1')
    add('--epsilon', type=data.pixels, metavar='E', help='L-infinity radius')
    add('--step-size', type=data.pixels, metavar='S', help='step size of the attack')
    add('--num-steps', type=int, metavar='N', help='number of attack steps')
    add('--dataset', default='cifar10', help='cifar10, cifar100, mnist, digits or FILE.npz')
    add('--data-dir', default='./data', help='missing data sets are downloaded here')
    add('--train-size', type=int, metavar='N', help='use only the first N training images')
    add('--test-size', type=int, metavar='N', help='use only the first N test images')
    add('--val-size', type=int, default=0, metavar='N', help='held-out training images for best.pt')
    add('--augment', choices=['none', 'crop', 'crop-flip'], help='data augmentation')
    add('--extra-data', metavar='FILE.npz', help='extra images, with keys image and label')
    add('--extra-fraction', type=float, default=0.7, metavar='F', help='their share of each batch')
    add('--arch', help=models.ARCHS)
    add('--init-from', metavar='FILE', help='start from the weights in this checkpoint')
    add('--epochs', type=int, metavar='N', help='passes over the training images')
    add('--batch-size', type=int, metavar='N', help='total over all processes')
    add('--lr', type=float, help='learning rate')
    add('--lr-schedule', choices=['multistep', 'cosine', 'onecycle'], help='learning-rate schedule')
    add('--lr-milestones', type=int, nargs='*', metavar='EPOCH', help='divide lr by 10 after each')
    add('--momentum', type=float, default=0.9, metavar='M', help='momentum of SGD')
    add('--weight-decay', '--wd', type=float, metavar='WD', help='weight decay of SGD')
    add('--awp-gamma', type=float, default=0.0, help='adversarial weight perturbation, e.g. 0.005')
    add('--awp-warmup', type=int, default=10, metavar='N', help='initial epochs without AWP')
    add('--ema', type=float, metavar='DECAY', help='average the weights, e.g. 0.995, for best.pt')
    add('--amp', action=argparse.BooleanOptionalAction, help='bfloat16 (default: if the GPU can)')
    add('--compile', nargs='?', const='default', metavar='MODE', help='compile the network')
    add('--seed', type=int, default=1, help='seed of all random numbers')
    add('--model-dir', metavar='DIR', help='where to save (default: runs/, named after the flags)')
    add('--resume', metavar='DIR', help='continue the run in this directory')
    add('--save-every-minutes', type=float, default=15, metavar='M', help='also within an epoch')
    add('--save-freq', type=int, default=0, metavar='N', help='keep every Nth epoch as epoch-E.pt')
    add('--no-cuda', action='store_true', help='train on the CPU')

    known, _ = parser.parse_known_args([word for word in argv if word not in ('-h', '--help')])
    saved = {} if known.resume is None else models.load(f'{known.resume}/last.pt')
    if known.resume and not (saved.get('algorithm') == ALGORITHM and 'optimizer' in saved):
        raise ValueError(f'{known.resume} holds no run of train_{ALGORITHM}.py to continue')
    past = {k: v for k, v in saved.get('args', {}).items() if k != 'no_cuda'}
    dataset, epochs = past.get('dataset', known.dataset), past.get('epochs')
    if past and past['lr_milestones'] == data.protocol(dataset, epochs)['lr_milestones']:
        del past['lr_milestones']  # they follow the number of epochs
    parser.set_defaults(**data.protocol(dataset, known.epochs or epochs) | past)
    args = parser.parse_args(argv)

    for message, holds in {  # known holds the flags of this command alone
        '--epochs, --num-steps, --batch-size, --lr and --tau must be above 0':
            all(v > 0 for v in (args.epochs, args.num_steps, args.batch_size, args.lr, args.tau)),
        '--seed and --awp-gamma must not be negative': args.seed >= 0 and args.awp_gamma >= 0,
        '--awp-warmup must be below --epochs': not args.awp_gamma or args.awp_warmup < args.epochs,
        '--begin-epoch must not exceed --epochs':
            (vars(args).get('begin_epoch') or 1) <= args.epochs,
        '--ema must lie between 0 and 1': args.ema is None or 0 < args.ema < 1,
        '--extra-fraction must leave original and extra images in each batch': not args.extra_data
            or 0.5 < args.extra_fraction * args.batch_size < args.batch_size - 0.5,
        '--tau needs --entropy-weight': args.entropy_weight or args.tau == 1,
        '--lr-milestones needs --lr-schedule multistep':
            args.lr_schedule == 'multistep' or known.lr_milestones is None,
        '--resume excludes --init-from and --model-dir':
            not saved or not (known.init_from or known.model_dir),
        '--arch names code to run: give it again to confirm':
            not saved or ':' not in args.arch or known.arch,
    }.items():
        if not holds:
            raise ValueError(message)
    args.model_dir = args.resume or args.model_dir or data.run_name(args, parser, ALGORITHM)
    return saved, args


def learning_rate(args, epochs_done):
    """The learning rate after epochs_done epochs, which may be fractional."""
    progress = epochs_done / args.epochs
    if args.lr_schedule == 'cosine':
        return args.lr * (1 + math.cos(math.pi * progress)) / 2
    if args.lr_schedule == 'onecycle':
        return args.lr * min(progress / 0.4, (1 - progress) / 0.6)
    return args.lr * 0.1 ** sum(epochs_done >= m for m in args.lr_milestones)


def all_reduce(value, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(value, op)
    return value


def backward(model, loss, batch_size):
    """Backpropagate the mean over the whole batch; loss: this process's sum. Returns the total."""
    (loss / batch_size).backward()
    if dist.is_initialized():  # one all-reduce for all gradients
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = all_reduce(torch.cat([g.flatten() for g in grads]))
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))
    return all_reduce(loss.detach())


def test(model, images, labels, args, layout, rank, world):
    """Accuracy on clean and PGD-10 examples (steps of epsilon / 4); and on the latter the mean
    entropy in nats, the share above 1.5, and the standard deviation of w (with args.tau)."""
    model.eval()
    sums, size = torch.zeros(6, dtype=torch.float64, device=images.device), 512
    for i in range(rank * size, len(images), world * size):
        x, y = data.to_float(images[i:i + size], layout), labels[i:i + size]
        data.seed(args.seed, i)
        x_adv = (x + torch.empty_like(x).uniform_(-args.epsilon, args.epsilon)).clamp(0, 1)
        low, high = (x - args.epsilon).clamp(0, 1), (x + args.epsilon).clamp(0, 1)
        for _ in range(10):
            x_adv = x_adv.detach().requires_grad_()
            grad, = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction='sum'), x_adv)
            x_adv = (x_adv.detach() + args.epsilon / 4 * grad.sign()).clamp(low, high)
        with torch.no_grad():
            logits, logits_adv = to_float32(model(x)), to_float32(model(x_adv))
        z = torch.stack([logits_adv, logits_adv / args.tau])
        log_p = F.log_softmax(z, dim=2).clamp(min=-1e4)
        h, h_tau = -(log_p.exp() * log_p).sum(2).double()
        sums += torch.stack([v.double().sum() for v in (
            logits.argmax(1) == y, logits_adv.argmax(1) == y, h, h > 1.5, h_tau, h_tau ** 2)])
    model.train()
    clean, pgd10, entropy, high, mean, square = (all_reduce(sums) / len(images)).tolist()
    return dict(clean=clean, pgd10=pgd10, entropy=entropy, high_entropy=high,
                sd_of_w=math.sqrt(max(square - mean ** 2, 0)) / max(mean, 1e-12))


def main(argv):
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))

    def say(text):
        if rank == 0:
            with contextlib.suppress(OSError):  # stdout is closed, or the disk is full
                print(text, flush=True)

    try:
        saved, args = parse_args(argv)

        # processes: one, or those that torchrun started
        cuda = torch.cuda.is_available() and not args.no_cuda
        device = torch.device(f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if cuda else 'cpu')
        if args.amp is None:
            args.amp = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        if cuda:
            torch.cuda.set_device(device)
            torch.backends.cudnn.benchmark = True
        loaded = data.load_run(args) if rank == 0 else None  # it downloads what is missing
        if world > 1:  # gloo as well, so that polling for signals does not wait for the GPU
            dist.init_process_group('cpu:gloo,cuda:nccl' if cuda else 'gloo')
            atexit.register(dist.destroy_process_group)
            atexit.register(time.sleep, 1)  # runs first: torch 2.4 hangs if gloo is still busy

        # data: all of it stays on the device as uint8
        images, labels, num_own, held_out, num_classes = loaded or data.load_run(args)
        images, labels, *held_out = (t.to(device) for t in (images, labels, *held_out))

        # network
        data.seed(args.seed)
        model = models.build_model(args.arch, num_classes, images.shape[1])
        if args.init_from and not saved:
            models.start_from(model, args.init_from)
        layout = getattr(model, 'memory_format', torch.contiguous_format)
        model = model.to(device, memory_format=layout)
        models.check_network(model, data.to_float(images[:3], layout), num_classes)
        if world > 1:
            if cuda:  # batch statistics of the whole batch
                model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)
        weights = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)  # except for the loss: attacks need gradients of their input
        ema = copy.deepcopy(model) if args.ema else None
        sgd = dict(momentum=args.momentum, weight_decay=args.weight_decay)
        optimizer = torch.optim.SGD(model.parameters(), args.lr, fused=cuda, **sgd)
        models.accelerate(model, args.amp, args.compile, (args.batch_size // world, 512))
        if ema:
            models.accelerate(ema, args.amp)

        # where the run stands
        about = dict(algorithm=ALGORITHM, dataset=args.dataset, arch=args.arch, args=vars(args),
                     num_classes=num_classes, device=device.type, processes=world,
                     images=data.checksum(images, labels, *held_out), torch=str(torch.__version__))
        before, now = saved.get('args', {}) | saved, vars(args) | about
        compared = before.keys() & now.keys() - {'args', 'resume', 'model_dir', 'no_cuda'}
        changed = {k: f'{k} {before[k]} -> {now[k]}' for k in compared if before[k] != now[k]}
        state = dict(epoch=0, step=0, total=0.0, log=[], seconds=0.0) | saved
        if changed.keys() & {'batch_size', 'images'}:  # the steps done were other batches
            state |= dict(step=0, total=0.0)
        epoch, step = state['epoch'], state['step']
        log = [{k: row.get(f'ema_{k}', v) for k, v in row.items() if not k.startswith('ema_')}
               for row in state['log']]  # runs of earlier versions tested both networks
        total = torch.tensor(state['total'], dtype=torch.float64, device=device)  # summed loss
        began = time.monotonic() - state['seconds']
        if saved:
            model.load_state_dict(saved['state_dict'])
            optimizer.load_state_dict(saved['optimizer'])
            optimizer.param_groups[0].update(sgd)
            if ema:
                ema.load_state_dict(saved['ema_state_dict'] or saved['state_dict'])

        if rank == 0:
            os.makedirs(args.model_dir, exist_ok=True)
            lock = models.lock(args.model_dir)  # until this process ends
            if not saved and any(name.endswith('.pt') for name in os.listdir(args.model_dir)):
                raise ValueError(f'{args.model_dir} contains a run: give --resume or --model-dir')
    except (OSError, ValueError, RuntimeError) as error:
        one_line = ' '.join(str(error).split())[:500]
        argparse.ArgumentParser(usage=argparse.SUPPRESS).error(one_line)

    unsaved = {}  # the content of each file that is yet to be written

    def save(*names):
        """Write config.json, log.csv and the named checkpoints; what fails is written next time."""
        if rank > 0:
            return
        content = dict(about, epoch=epoch, step=step, log=log, total=total.item(),
                       seconds=time.monotonic() - began, state_dict=model.state_dict(),
                       optimizer=optimizer.state_dict(), ema_state_dict=ema and ema.state_dict())
        buffer = io.BytesIO()
        torch.save(content, buffer)
        config = json.loads(json.dumps(about), parse_constant=str)  # JSON has no inf
        rows = [[*log[-1]], *([row.get(k, '') for k in log[-1]] for row in log)] if log else []
        unsaved.update({
            'config.json': json.dumps(config, indent=1).encode(),
            'log.csv': ''.join(','.join(map(str, row)) + '\n' for row in rows).encode(),
            **dict.fromkeys(names, buffer.getbuffer())})
        try:
            for name in sorted(unsaved, key=lambda name: name == 'last.pt'):  # last.pt comes last
                with models.atomic_write(f'{args.model_dir}/{name}', 'wb') as f:
                    f.write(unsaved[name])
                del unsaved[name]
        except OSError as error:
            say(f'Warning: cannot save in {args.model_dir} ({error.strerror}); training continues')

    # on Ctrl-C, kill or a cluster's time limit, the run ends after the step, saved
    stop = torch.zeros((), dtype=torch.int)

    def ask_to_stop(number, _):
        stop.fill_(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # not SIGTERM: clusters send it twice

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, ask_to_stop)

    say('; '.join([f'{args.arch}, {len(images):,} images, {world} x {device.type}',
                   f'{args.model_dir}: {epoch} epochs and {step} steps done', *changed.values()]))
    saved_at = time.monotonic()
    for epoch in range(epoch, args.epochs):
        data.seed(args.seed, epoch)
        batches = data.draw_batches(num_own, len(images), args, device)
        num_steps, num_images = len(batches), sum(map(len, batches))
        num_done, epoch_began = 0, time.monotonic()
        bar = tqdm(range(step, num_steps), f'epoch {epoch + 1}/{args.epochs}', leave=False,
                   disable=None if rank == 0 and sys.stderr else True)
        for step in bar:
            optimizer.param_groups[0]['lr'] = learning_rate(args, epoch + (step + 0.5) / num_steps)
            # Each process draws for the whole batch and takes its share, so that the number of
            # processes does not change the result
            data.seed(args.seed, epoch, step)
            x, y = images[batches[step]], labels[batches[step]]
            x, batch_size = data.to_float(data.augment(x, args.augment), layout), len(y)
            x_start = random_start(x, args.epsilon)
            x, x_start, y = (t.tensor_split(world)[rank] for t in (x, x_start, y))
            data.seed(args.seed, epoch, step, 1 + rank)  # dropout

            adv = attack(model, x, x_start, y, args.step_size, args.epsilon, args.num_steps)
            for p in weights:
                p.requires_grad_(True)
            loss_args = dict(model=model, x_natural=x, y=y, optimizer=optimizer, adv=adv,
                             perturb_steps=args.num_steps, entropy_weight=args.entropy_weight,
                             tau=args.tau, reduction='sum', **loss_options(args, epoch))
            unperturbed = []
            if args.awp_gamma and epoch >= args.awp_warmup:
                statistics = models.snapshot(model.buffers())
                backward(model, loss_function(**loss_args), batch_size)
                models.restore(statistics)  # batch normalization counts the other pass
                unperturbed = models.perturb_weights(model, args.awp_gamma)
            total += backward(model, loss_function(**loss_args), batch_size)
            models.restore(unperturbed)
            model.requires_grad_(False)
            optimizer.step()
            if world > 1 and not cuda:  # one set of batch statistics, as a resumed run has
                for statistics in model.buffers():
                    dist.broadcast(statistics, 0)
            if ema:  # the weights before the first step do not count
                models.average(ema, model, args.ema if epoch or step else 0)

            step, num_done = step + 1, num_done + batch_size
            asked = int(all_reduce(stop, dist.ReduceOp.MAX))  # by a signal to any of the processes
            due = time.monotonic() > saved_at + 60 * args.save_every_minutes
            saving = asked or due or step == num_steps  # also before the evaluation of an epoch
            if saving or step % -(-num_steps // 4) == 0:
                loss = total.item() / min(step * args.batch_size, num_images)
                if not (math.isfinite(loss) and all(p.isfinite().all() for p in weights)):
                    sys.exit(f'diverged by step {step} of epoch {epoch + 1}: try a lower --lr')
                bar.set_postfix(loss=f'{loss:.3f}')
                if bar.disable:
                    say(f'epoch {epoch + 1}, step {step}/{num_steps}: loss {loss:.3f}')
            if saving:
                save('last.pt')
                saved_at = time.monotonic()
            if asked:
                all_reduce(torch.zeros(1))  # until the first process has saved
                say(f'stopped; continue with --resume {args.model_dir}')
                sys.exit(128 + asked)

        log.append(dict(epoch=epoch + 1, lr=optimizer.param_groups[0]['lr'],
                        loss=total.item() / num_images,
                        images_per_s=num_done / (time.monotonic() - epoch_began),
                        **test(ema or model, *held_out, args, layout, rank, world),
                        seconds=time.monotonic() - began))
        epoch, step = epoch + 1, 0
        total.zero_()
        is_best = max(log, key=lambda row: row['pgd10']) is log[-1]
        keep = args.save_freq and epoch % args.save_freq == 0
        save(*['best.pt'] * is_best, *[f'epoch-{epoch}.pt'] * keep, 'last.pt')
        say('  '.join(f'{name} {value:.4g}' for name, value in log[-1].items()))

    if unsaved:
        sys.exit(f'{", ".join(unsaved)} could not be saved in {args.model_dir}')
    say(f'finished; evaluate it with: python evaluate.py --model-path {args.model_dir}')


if __name__ == '__main__':
    main(sys.argv[1:])
