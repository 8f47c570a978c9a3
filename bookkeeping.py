"""A training run: its flags, directory, log, checkpoints, progress, signals and processes.

Nothing here knows an algorithm, and no number of a run depends on it: random draws follow from
(seed, epoch, step), so what a run is resumed from is its weights, its optimizer and its log.
"""
import contextlib
import copy
import csv
import json
import math
import os
import re
import shlex
import signal
import sys
import time

import torch
import torch.nn as nn
from tqdm import tqdm

import commands
import data
import models
from commands import real, whole

# What a resumed run may be given anew: it leaves the result alone (and --epochs may only grow).
RESUMABLE = ('resume', 'model_dir', 'data_dir', 'epochs', 'log_interval', 'save_freq',
             'save_every_minutes', 'allow_chance')


# ---------------------------------------------------------------- arguments

def add_run_args(parser):
    """The flags that a Run takes."""
    add = parser.add_argument_group('run').add_argument
    add('--seed', type=whole(0, 2 ** 32 - 1), default=1, help='of all random numbers, from 0')
    add('--model-dir', metavar='DIR', help='holds no run yet (default: '
        'runs/DATASET-[ew-]ALGORITHM-FLAGS-seedSEED, with the flags that make it another run)')
    add('--resume', metavar='DIR', help='go on with that run, on the kind of device it began on; '
        f'given anew may be its {", ".join(RESUMABLE[2:])}')
    add('--save-every-minutes', type=real('(0, inf]'), default=15, help='inside epochs; inf: never')
    add('--save-freq', type=whole(0), default=0,
        help='keep epoch-E.pt every N epochs; 0: last.pt and best.pt alone')
    add('--log-interval', type=whole(1), default=100, help='steps between two reports')
    add('--test-batch-size', type=whole(1), default=512, help='images at once, from 1')
    add('--allow-chance', action='store_true', help='go on after five epochs at chance')
    add('--no-cuda', action='store_true', help='train on the CPU')


def complete_args(parser, argv, algorithm):
    """The arguments in argv, complete by protocol or by the run that --resume names.

    Raises ValueError or OSError for what does not fit together.
    """
    args = parser.parse_args(argv)
    if args.resume:
        return resumed_args(parser, argv, args.resume, algorithm)
    chosen = {k: v for k, v in vars(args).items() if v != parser.get_default(k)}
    data.fill_protocol(args)
    parser.refuse_idle(argv, {
        '--tau': (args.entropy_weight, 'without --entropy-weight'),
        '--awp-gamma': (not args.awp_gamma or args.awp_warmup < args.epochs,
                        f'in {args.epochs} epochs with --awp-warmup {args.awp_warmup}'),
        '--awp-warmup': (args.awp_gamma, 'without --awp-gamma'),
        '--extra-fraction': (args.extra_data, 'without --extra-data'),
        '--test-size': (not args.val_size, 'with --val-size'),
        '--lr-milestones': (args.lr_schedule == 'multistep',
                            f'with --lr-schedule {args.lr_schedule}')})
    if args.model_dir is None:
        args.model_dir = os.path.join('runs', run_name(args, chosen, algorithm))
    return args


def resumed_args(parser, argv, directory, algorithm):
    """The arguments of the run in a directory (or of its last.pt), with those anew that may be."""
    if os.path.basename(directory) == 'last.pt':
        directory = os.path.dirname(directory) or '.'
    run = read_run(directory, algorithm)
    saved = run['args'] | {'resume': directory, 'model_dir': directory}
    if run.get('device') == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'{directory}: began on a CUDA device, whose random numbers no CPU draws, '
                         'and there is none here')
    saved['no_cuda'] |= run.get('device') == 'cpu'
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    if not any(word.startswith('--arch') for word in argv or sys.argv[1:]):
        models.refuse_unnamed(args.arch, directory)
    args.resume = directory
    for name, value in saved.items():
        given = getattr(args, name)
        if given != value and (name not in RESUMABLE or name == 'epochs' and given < value):
            raise ValueError(f'--{name.replace("_", "-")} {given} is not that of the run, {value}')
    args.augment = args.augment or data.find_dataset(args.dataset).protocol['augment']  # old runs
    return args


def run_name(args, chosen, algorithm):
    """DATASET-[ew-]ALGORITHM, what was chosen that makes it another run, and the seed.

    chosen: {name: value} of the arguments that are not at their default.
    """
    told = {'dataset', 'entropy_weight', 'seed', 'no_cuda', *RESUMABLE} - {'epochs'}
    protocol = data.default_protocol(args.dataset, args.epochs)
    dataset = os.path.splitext(os.path.basename(args.dataset))[0]
    parts = [dataset, ('ew-' if args.entropy_weight else '') + algorithm]
    for name, value in chosen.items():
        flag = name.replace('_', '-')
        if name in told or value == protocol.get(name):
            continue
        if isinstance(value, bool):
            parts.append(flag if value else f'no-{flag}')
        elif isinstance(value, str):
            if name == 'arch':
                value = os.path.basename(value).replace('.py:', '-')
            value = re.sub(r'[^\w.]+', '-', os.path.splitext(value)[0]).strip('-')
            parts.append(value if name == 'arch' else f'{flag}-{value}')
        else:
            numbers = value if isinstance(value, list) else [value]
            parts.append(flag + '-'.join(f'{v:g}' for v in numbers))
    return '-'.join([*parts, f'seed{args.seed}'])


# ---------------------------------------------------------------- a run

class Run:
    """Where a run stands, and all that happens to it beside the training.

    device: what it runs on; rank, world: this process, and how many there are; epoch, step: what
    is done, epochs and steps of the next. The training calls, in this order:

        begin(...)                          once; claims the directory, or restores the run
        steps(...), share(...), backward(...), after_step(...)      in each epoch and step
        after_epoch(...)                    saves, reports
        finish()

    An end that is not success is a commands.Stop.
    """

    def __init__(self, args, algorithm):
        self.args, self.algorithm = args, algorithm
        self.device = commands.pick_device(args.no_cuda)
        self.rank, self.world = commands.init_processes(self.device)
        self.epoch, self.step, self.seconds, self.log = 0, 0, 0.0, []
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)  # loss of the epoch
        self.failure = None  # of the last attempt to save
        self.unsaved = {}  # {name: content} that could not be written yet
        self.signal = 0  # that asks for the end

    def begin(self, images, model, optimizer, ema):
        """Claim the directory and, to go on with a run, restore it.

        images: the data.TrainingData; ema: the averaged network or None. Raises ValueError, where
        the network does not fit the images as well, or OSError.
        """
        self.images_per_epoch, self.num_classes = images.images_per_epoch, images.num_classes
        self.model, self.optimizer, self.ema = model, optimizer, ema
        args = self.args
        models.check_fit(model, images.shape, images.num_classes,
                         f'{args.init_from or args.arch}, on {args.dataset}')
        if self.rank == 0:
            self.lock = claim_directory(args.model_dir, new=not args.resume)
        if args.resume:
            saved = read_run(args.resume, self.algorithm)
            model.load_state_dict(saved['state_dict'])
            optimizer.load_state_dict(saved['optimizer'])
            if ema:
                ema.load_state_dict(saved['ema_state_dict'])
            self.epoch, self.step = saved['epoch'], saved['step']
            self.seconds, self.log = saved['seconds'], saved['log']
            self.total.fill_(saved['total'])
        self.began, self.saved_at = time.time() - self.seconds, time.time()
        self.about = {'algorithm': self.algorithm, 'dataset': args.dataset, 'arch': args.arch,
                      'num_classes': images.num_classes,
                      'args': vars(args), 'device': self.device.type,
                      'versions': commands.versions(self.device)}
        self.write_config()
        method = self.algorithm + ' with entropy weights' * args.entropy_weight
        selected = 'validation images' if args.val_size else 'test images (optimistic)'
        commands.tell(f'{method}: {args.arch}, {args.epochs} epochs of {self.images_per_epoch:,} '
                      f'images of {args.dataset}, {self.world} process(es) on '
                      f'{self.about["versions"]["device"]}; kept in {args.model_dir}; best.pt is '
                      f'selected on the {selected}')
        if args.amp and not models.has_bfloat16(self.device):
            commands.tell('--amp: this CPU has no bfloat16 units, float32 is many times as fast: '
                          'leave --amp out', sys.stderr)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, self.catch)

    def write_config(self):
        """config.json: the settings, the command that began the run, and those that went on."""
        if self.rank > 0:
            return
        path = os.path.join(self.args.model_dir, 'config.json')
        began, resumed = {}, []
        if self.args.resume:
            with contextlib.suppress(OSError, ValueError), open(path) as f:
                began = json.load(f)
            resumed = [*began.get('resumed', []), sys.argv]
        command = began.get('command', sys.argv)
        config = self.about | {'processes': self.world, 'command': command, 'resumed': resumed}
        config = json.loads(json.dumps(config), parse_constant=str)  # JSON has no infinity
        try:
            with models.replacing(path, 'w') as f:
                json.dump(config, f, indent=1)
        except OSError as error:
            commands.say(f'{path} could not be written ({error.strerror}); going on', sys.stderr)

    def steps(self, num_steps):
        """The steps of an epoch that are still to be done, from 0; after_step counts them."""
        self.num_steps, self.first = num_steps, self.step
        self.finite = torch.zeros((), device=self.device)  # steps until the loss was not
        warm_up = self.step + min(10, (num_steps - self.step) // 2)  # which the images/s leave out
        start = time.time()
        self.bar = tqdm(range(self.step, num_steps), f'epoch {self.epoch + 1}/{self.args.epochs}',
                        num_steps, initial=self.step, unit='batch', leave=False,
                        disable=None if self.rank == 0 else True)
        for step in self.bar:
            if step == warm_up:
                synchronize(self.device)
                start = time.time()
            yield step
        synchronize(self.device)
        timed = self.images_done() - warm_up * self.args.batch_size
        self.images_per_s = timed / (time.time() - start)

    def share(self, *tensors):
        """This process's part of each tensor of a whole batch."""
        return [t.tensor_split(self.world)[self.rank] for t in tensors]

    def backward(self, loss, batch_size):
        """Gradients of a loss summed over the batch, divided by the batch's size; its value.

        Under several processes loss is that of this process's share, and gradients and value are
        those of the whole batch.
        """
        (loss / batch_size).backward()
        return sum_over_processes(self.model, loss.detach())

    def images_done(self):
        return min(self.step * self.args.batch_size, self.images_per_epoch)

    def after_step(self, loss):
        """Count a step of that summed loss; report and save where it is time, and end where asked.

        Only where it reports or saves does the host wait for the device.
        """
        self.step += 1
        self.total += loss
        self.finite += self.total.isfinite()
        done = self.step == self.num_steps
        report = self.step % self.args.log_interval == 0
        due = time.time() > self.saved_at + 60 * self.args.save_every_minutes
        if report or due or self.signal or done:
            self.check_finite()
            mean = f'{self.loss:.3f}'
            self.bar.set_postfix(loss=mean)
            if report and self.bar.disable:
                commands.tell(f'epoch {self.epoch + 1}/{self.args.epochs}  '
                              f'step {self.step}/{self.num_steps}  loss {mean}')
        if not done:
            if due:
                self.save('last')
            self.end_if_asked()

    def check_finite(self):
        self.loss = self.total.item() / self.images_done()
        if not math.isfinite(self.loss) or not all_finite(self.model):
            first = min(self.first + int(self.finite) + 1, self.num_steps)
            self.stop(3, f'the loss or a weight is not finite, epoch {self.epoch + 1}, step '
                      f'{first}, learning rate {self.optimizer.param_groups[0]["lr"]:g}; the last '
                      'checkpoint is untouched. Try a lower --lr, or --no-amp')

    def after_epoch(self, measured):
        """Log an epoch, with what evaluate_epoch measured; save and report; end where asked."""
        row = {'epoch': self.epoch + 1, 'lr': self.optimizer.param_groups[0]['lr'],
               'loss': self.loss, **measured, 'images_per_s': self.images_per_s,
               'seconds': time.time() - self.began}
        self.log.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self.total.zero_()
        names = []
        if best_row(self.log) is row:
            names.append('best')
        if self.args.save_freq and self.epoch % self.args.save_freq == 0:
            names.append(f'epoch-{self.epoch}')
        self.save(*names, 'last')
        commands.tell(describe(row, self.args.epochs))
        careful = not self.args.allow_chance and not self.args.resume
        if careful and is_stuck(self.log, self.num_classes):
            self.stop(3, 'no better than chance for five epochs, and the loss does not fall; '
                      f'best.pt is from epoch {best_row(self.log)["epoch"]}. Try a lower --lr or '
                      f'--awp-gamma; to go on all the same: {self.resume_command()}')
        if self.epoch < self.args.epochs:
            self.end_if_asked()

    def finish(self):
        commands.over_processes(0)  # none leaves while another still needs it
        if self.failure:
            self.stop(1, self.failure)
        best = accuracies(best_row(self.log))
        script = os.path.join(os.path.dirname(sys.argv[0]), 'evaluate.py')
        path = os.path.join(self.args.model_dir, 'best.pt')
        commands.tell(f'best epoch {best_row(self.log)["epoch"]}: {best}. Next: '
                      + shlex.join(['python', script, '--model-path', path]))

    def save(self, *names):
        """Write <name>.pt for each name, 'last' at the end, and log.csv.

        What could not be written is kept and tried again first at the next save, and last.pt never
        gets ahead of it: a run that goes on from last.pt makes again what is missing. A failure is
        said on stderr and no more: the run goes on.
        """
        self.saved_at = time.time()
        if self.rank > 0:
            return
        directory = self.args.model_dir
        content = self.about | {
            'epoch': self.epoch, 'step': self.step, 'total': self.total.item(),
            'seconds': time.time() - self.began, 'log': self.log,
            'state_dict': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'ema_state_dict': self.ema and self.ema.state_dict()}
        self.unsaved |= dict.fromkeys(names, content)
        try:
            for name in list(self.unsaved):
                models.save_checkpoint(self.unsaved[name], os.path.join(directory, f'{name}.pt'))
                del self.unsaved[name]
            with models.replacing(os.path.join(directory, 'log.csv'), 'w', newline='') as f:
                writer = csv.DictWriter(f, self.log[0] if self.log else [])
                writer.writeheader()
                writer.writerows(self.log)
            self.failure = None
        except (OSError, RuntimeError) as error:
            self.unsaved.pop('last', None)
            self.unsaved = copy.deepcopy(self.unsaved)  # the weights in it go on moving
            self.failure = f'could not save in {directory}: {error}'
            commands.say(f'{self.failure}; going on, the next save tries again', sys.stderr)

    def resume_command(self):
        launcher = ['python']
        if self.world > 1:
            launcher = ['torchrun', f'--nproc-per-node={self.world}']
        return shlex.join([*launcher, sys.argv[0], '--resume', self.args.model_dir])

    def stop(self, status, why):
        raise commands.Stop(why if self.rank == 0 else None, status)

    def catch(self, number, frame):
        """The handler of signals: the first ends the run after its step, the second at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def end_if_asked(self):
        """Save and end the run where any process was asked to by a signal."""
        number = commands.over_processes(self.signal)
        if number:
            self.save('last')
            commands.over_processes(0)
            self.stop(128 + number, f'stopped; to go on: {self.resume_command()}')


# ---------------------------------------------------------------- directories and logs

def read_run(directory, algorithm):
    """The content of a run's last.pt; FileNotFoundError or ValueError names the file."""
    path = os.path.join(directory, 'last.pt')
    content = models.read_checkpoint(path)
    keys = {'algorithm', 'args', 'state_dict', 'optimizer', 'epoch', 'step', 'total', 'seconds',
            'log'}
    if not isinstance(content, dict) or not keys <= content.keys():
        raise ValueError(f'{path}: not a checkpoint that a run can go on from')
    if content['algorithm'] != algorithm:
        raise ValueError(f'{path}: of train_{content["algorithm"]}.py, not of train_{algorithm}.py')
    return content


def claim_directory(path, new):
    """Make the directory and lock it until this process ends, however it ends; returns the lock.

    Raises ValueError where another process has it or, for a new run, where it holds one; OSError
    where it cannot be written.
    """
    os.makedirs(path, exist_ok=True)
    with contextlib.ExitStack() as failed:
        lock = failed.enter_context(open(os.path.join(path, '.lock'), 'w'))
        try:
            commands.lock(lock, wait=False)
        except BlockingIOError:
            raise ValueError(f'{path}: another process is training there') from None
        if new and any(name.endswith('.pt') for name in os.listdir(path)):
            raise ValueError(f'{path} already holds a run; --resume it, or choose another '
                             '--model-dir')
        failed.pop_all()  # leaves it open
    return lock


def best_row(log):
    """The epoch of highest PGD-10 accuracy, of the averaged weights where there are such."""
    return max(log, key=lambda row: row.get('ema_pgd10', row['pgd10']))


def is_stuck(log, num_classes, patience=5):
    """Whether the last epochs were all at chance and the loss did not fall: a run that collapsed
    or never began to learn."""
    recent = log[-patience:]
    at_chance = all(row['clean'] < 1.5 / num_classes for row in recent)
    return len(log) >= patience and at_chance and recent[-1]['loss'] > 0.99 * recent[0]['loss']


def accuracies(row):
    """Of a row of log.csv, what best.pt is selected on: those of the average where there is one."""
    prefix, note = ('ema_', ' (average)') if 'ema_pgd10' in row else ('', '')
    return f'clean {row[f"{prefix}clean"]:.2%}, pgd10 {row[f"{prefix}pgd10"]:.2%}{note}'


def describe(row, epochs):
    """A row of log.csv as the line that a person reads, with the time that is left."""
    left = row['seconds'] / row['epoch'] * (epochs - row['epoch'])
    prefix = 'ema_' if 'ema_pgd10' in row else ''
    entropy, high = row[f'{prefix}entropy'], row[f'{prefix}high_entropy']
    return (f'epoch {row["epoch"]}/{epochs}  lr {row["lr"]:g}  loss {row["loss"]:.3f}  '
            f'{accuracies(row)}  entropy {entropy:.2f}, {high:.1%} above 1.5  '
            f'{row["images_per_s"]:,.0f} images/s  {int(left // 60)}:{int(left % 60):02} min left')


def all_finite(model):
    """Whether no weight is NaN or infinite."""
    return bool(torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all())


def synchronize(device):
    """Wait for a CUDA device to finish, so that a clock can be read."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------- several processes (torchrun)

def same_everywhere(model):
    """The same weights in all processes and, on GPUs, batch statistics over the whole batch."""
    if torch.distributed.is_initialized():
        if next(model.parameters()).is_cuda:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for tensor in model.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    return model


def sum_over_processes(model, loss):
    """Sum gradients, in place, and losses over all processes, in one message; returns the loss."""
    if not torch.distributed.is_initialized():
        return loss
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads] + [loss.to(grads[0].dtype).view(1)])
    torch.distributed.all_reduce(flat)
    for g, part in zip(grads, flat[:-1].split([g.numel() for g in grads])):
        g.copy_(part.view_as(g))
    return flat[-1]
