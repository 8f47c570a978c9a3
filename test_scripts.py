"""The commands, end to end; in this process, except where the process itself is what is tested."""
import argparse
import collections
import copy
import csv
import functools
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
import zlib
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyautoattack
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
import torchvision.transforms.functional as TF
from PIL import Image

import data
import evaluate
import models
import train_at

torch.set_num_threads(1)  # small work: more threads only get in each other's way

ROOT = Path(__file__).parent
ALGORITHMS = 'at', 'trades', 'mart', 'gairat'
METHODS = {f'{ew}{name}': (name, '--entropy-weight' * bool(ew))
           for name in ALGORITHMS for ew in ('', 'ew-')} | {
               'ew-gairat': ('gairat', '--entropy-weight --tau inf')}
SHORT = '--epochs 2 --num-steps 2 --batch-size 16 --test-size 16 --no-cuda --model-dir run'
OWN = f'--dataset own.npz --epsilon 0.1 {SHORT}'  # batches of 16, 16, 16 and 4 images
NET, PLAIN = f'{OWN} --arch net.py:Net', f'{OWN} --arch net.py:plain'
EVERYTHING = ('--entropy-weight --ema 0.8 --awp-gamma 0.01 --awp-warmup 1 --lr-schedule cosine '
              '--extra-data extra.npz')
EACH_STEP = '--save-every-minutes 1e-9'
every_algorithm = pytest.mark.parametrize('algorithm', ALGORITHMS)

# A network as people write them, with a layer that is not used and a frozen weight; and bad ones
NETS = """from __future__ import annotations
import dataclasses, torch, torch.nn as nn, helper
@dataclasses.dataclass
class Settings:
    width: int = 6
class Net(nn.Module):
    def __init__(self, num_classes, fault=None):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, Settings().width, 3, 2), nn.BatchNorm2d(6)
        self.drop, self.sub_block1 = nn.Dropout(0.2), nn.Linear(54, num_classes)
        self.sub_block1 = nn.utils.parametrizations.weight_norm(self.sub_block1)
        self.unused, self.fault = nn.Linear(3, 3), fault
        self.frozen = nn.Linear(num_classes, num_classes).requires_grad_(False)
        for name, value in (('mask', [0, -torch.inf]), ('mean', [0.0]), ('std', [1.0])):
            self.register_buffer(name, torch.tensor(value))
    def forward(self, x):
        x = {'detach': x.detach, 'change': lambda: x.sub_(1), 'root': lambda: x + (  # slope 0 / 0
            x - x.clamp(0, 1)).abs().sqrt()}.get(self.fault, lambda: x)()
        x = self.bn(self.conv((x - self.mean) / self.std)).relu()
        x = self.frozen(self.sub_block1(self.drop(x.view(x.size(0), -1)))) + self.mask[0]
        return (x, x) if self.fault == 'tuple' and self.training else x
detach, change, tuple, root = (lambda num_classes, f=f: Net(num_classes, f) for f in (
    'detach', 'change', 'tuple', 'root'))
class Linear(nn.Linear):
    def forward(self, x):
        helper.calls.append(len(x))
        return helper.change(super().forward(helper.before(x).flatten(1)))
linear = lambda num_classes: Linear(64, num_classes)
class Half(nn.Linear):  # of uniform predictions
    def forward(self, x):
        return 0 * super().forward(x.flatten(1)).bfloat16()
half = lambda num_classes: Half(64, num_classes)
plain = lambda num_classes: nn.Sequential(
    nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))
norm = lambda num_classes: nn.Sequential(
    nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, num_classes))
eleven, colored, number = lambda: Net(11), lambda: nn.Conv2d(3, 5, 8), lambda: 5
raises = lambda: 1 / 0
def buffer(num_classes):
    network = plain(num_classes)
    network.register_buffer('extra', torch.ones(1).expand(3))
    return network
"""


def own_images(seed=0, **changed):
    """Write own.npz, 52 and 20 images of 8 x 8 in 5 classes, and extra.npz, 30 more."""
    rng = np.random.default_rng(seed)
    patterns, arrays = rng.uniform(size=(5, 8, 8, 1)), {}
    for images, labels, n in (('train_images', 'train_labels', 52), ('image', 'label', 30),
                              ('test_images', 'test_labels', 20)):
        y = arrays[labels] = np.arange(n) % 5
        x = 0.5 * patterns[y] + 0.5 * rng.uniform(size=(n, 8, 8, 1))
        arrays[images] = (255 * x).astype(np.uint8)
    np.savez('own.npz', **arrays | changed)  # both files hold all arrays
    np.savez('extra.npz', **arrays | changed)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test works in a folder of its own, with images and networks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])  # --arch adds to it
    own_images()
    Path('net.py').write_text(NETS)
    Path('helper.py').write_text('')  # which net.py imports
    for name, handler in (('INT', signal.default_int_handler), ('HUP', 0), ('TERM', 0)):
        signal.signal(signal.Signals[f'SIG{name}'], handler)  # not ignored, nor a run's before


def script(name):
    return importlib.import_module(name if name == 'evaluate' else f'train_{name}')


def run_main(name, *flags, status=0):
    """(stdout, stderr) of a command in this process, which ends with that status."""
    out, err, got = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, 'argv', [f'{script(name).__name__}.py'])
        try:
            script(name).main(' '.join(map(str, flags)).split())
        except SystemExit as error:
            got = error.code
    if isinstance(got, str):  # as Python does
        err.write(f'{got}\n')
        got = 1
    assert got == status, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


train, command = run_main, functools.partial(run_main, 'evaluate')


def refused(name, *flags):
    """The one line on stderr of a command that ends with exit status 2 and writes nothing."""
    before = sorted(Path().rglob('*'))
    out, err = run_main(name, *flags, status=2)
    assert out == '' and re.fullmatch(rf'{script(name).__name__}\.py: error: .+\n', err), err
    assert sorted(path for path in Path().rglob('*') if '__pycache__' not in str(path)) == before
    return err


def flags_of(algorithm, flags):
    """The flags as the command parses them."""
    return script(algorithm).parse_args(flags.split())[1]


@contextmanager
def hooks(step=lambda optimizer, n: None, forward=lambda network, x: None):
    """Call step(optimizer, n) after step n, forward(network, x) after each pass of a network."""
    steps = []
    def stepped(optimizer, *args):
        steps.append(1)
        step(optimizer, len(steps))
    def passed(module, args, output):
        if type(module).__name__ in ('Net', 'Sequential') and len(args[0]) > 3:  # no trial pass
            forward(module, args[0])
    with register_optimizer_step_post_hook(stepped), register_module_forward_hook(passed):
        yield


def kill(number, *steps):
    """For hooks: send this process a signal after these steps."""
    return lambda optimizer, n: n in steps and os.kill(os.getpid(), number)


def in_child(algorithm, flags, step=kill(0), **environment):
    """Start a training command in a child process, which need not import torch again."""
    def run():
        os.environ.update(environment)
        with hooks(step):
            script(algorithm).main(flags.split())
    process = multiprocessing.get_context('fork').Process(target=run)
    process.start()
    return process


def run_pair(algorithm, flags, step=kill(0)):
    """Train in two processes, the second with step as a hook. Return their exit statuses."""
    with socket.create_server(('localhost', 0)) as probe:
        port = str(probe.getsockname()[1])
    children = [in_child(algorithm, flags, hook, RANK=str(rank), WORLD_SIZE='2', MASTER_PORT=port,
                         MASTER_ADDR='localhost') for rank, hook in enumerate([kill(0), step])]
    return [child.join(100) or child.exitcode for child in children]


def last_of(directory='run', name='last'):
    return models.load(f'{directory}/{name}.pt')


def losses_of(directory='run'):
    return [row['loss'] for row in last_of(directory)['log']]


def comparable(value):
    """A checkpoint's content without times and flags; tensors as bytes."""
    if isinstance(value, dict):
        times = 'images_per_s', 'seconds', 'args'
        return {k: comparable(v) for k, v in value.items() if k not in times}
    if isinstance(value, list):
        return [comparable(v) for v in value]
    return value.detach().numpy().tobytes() if torch.is_tensor(value) else value


def same_run(a, b):
    """Whether two runs have the same weights, averages, momenta, logs and best epoch."""
    def content(directory):
        with open(f'{directory}/log.csv', newline='') as f:
            rows = list(csv.DictReader(f))
        return comparable([rows, last_of(directory), last_of(directory, 'best')])
    return content(a) == content(b)


def full_disk(patch, when, function='replace'):
    """Let os.replace or os.fsync fail where when(*arguments) is true."""
    original = getattr(os, function)
    def patched(*args):
        if when(*args):
            raise OSError(28, 'No space left on device')
        return original(*args)
    patch.setattr(os, function, patched)


# ---------------------------------------------------------------- what a run leaves
@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The eight methods, trained on a few images: {name: directory}."""
    found = {name: tmp_path_factory.mktemp('runs') / name for name in METHODS}
    with pytest.MonkeyPatch.context() as patch:
        folder.__wrapped__(tmp_path_factory.mktemp('data'), patch)
        for name, (algorithm, flag) in METHODS.items():
            assert train(algorithm, NET, flag, '--model-dir', found[name])[1] == ''
    return found


def test_each_method_writes_its_log_configuration_and_weights(runs):
    columns = 'epoch lr loss images_per_s clean pgd10 entropy high_entropy sd_of_w seconds'
    for name, directory in runs.items():
        assert sorted(os.listdir(directory)) == '.lock best.pt config.json last.pt log.csv'.split()
        last, best = last_of(directory), last_of(directory, 'best')
        rows = list(csv.DictReader((directory / 'log.csv').open(newline='')))
        assert [{k: float(v) for k, v in row.items()} for row in rows] == last['log']
        assert [(' '.join(row), row['epoch'], row['lr']) for row in last['log']] == [
            (columns, 1, 0.1), (columns, 2, 0.1)]
        config = json.loads((directory / 'config.json').read_text(), parse_constant=pytest.fail)
        assert config['args']['step_size'] == 2 / 255 and last['algorithm'] == config['algorithm']
        assert best['epoch'] == 1 + (last['log'][1]['pgd10'] > last['log'][0]['pgd10'])
    weights = [comparable(last_of(path)['state_dict']['conv.weight']) for path in runs.values()]
    assert len(set(weights)) == 8  # another loss gives other weights


@every_algorithm
def test_defaults_are_the_protocol_of_the_paper(algorithm):
    def defaults(names, flags=''):
        return [getattr(flags_of(algorithm, flags), name) for name in names.split()]
    names = 'arch epochs lr lr_milestones epsilon step_size num_steps weight_decay augment'
    cifar = ['preactresnet18', 110, 0.1, [100, 105], 8 / 255, 2 / 255, 10, 5e-4, 'crop-flip']
    mnist = ['smallcnn', 100, 0.01, [20, 40], 0.3, 0.01, 40, 1e-4, 'none']
    assert defaults(names) == defaults(names, '--dataset cifar100') == cifar
    assert defaults(names, '--dataset mnist') == mnist
    assert defaults(names, '--dataset own.npz') == cifar[:-1] + ['crop']
    assert defaults('batch_size momentum tau seed') == [128, 0.9, 1, 1]
    assert defaults('lr_milestones epsilon', '--epochs 11 --epsilon 0.031') == [[10, 11], 0.031]
    options = {'at': [{}, {}], 'trades': [{'beta': 6}] * 2, 'mart': [{'beta': 6}] * 2,
               'gairat': [{'psi': math.inf}, {'psi': -1}]}  # weights from half of the epochs on
    loss_options, args = script(algorithm).loss_options, flags_of(algorithm, '--epochs 11')
    assert [loss_options(args, epoch) for epoch in (3, 4)] == options[algorithm]


@pytest.mark.parametrize('flag, kind', [('', 'state_dict'), ('--ema 0.5', 'ema_state_dict')])
def test_best_is_the_first_epoch_with_the_highest_pgd10(flag, kind):
    train('at', PLAIN, '--augment none --lr 2 --epochs 9 --save-freq 1', flag)
    pgd10 = [row['pgd10'] for row in last_of()['log']]
    best = pgd10.index(max(pgd10)) + 1
    assert 1 < best < 9, 'choose another learning rate'
    for name, epoch in (('best', best), ('last', 9)):
        kept = [comparable(last_of(name=n)[kind]) for n in (name, f'epoch-{epoch}')]
        assert kept[0] == kept[1]
    train('at', PLAIN, '--lr 1e-9 --epochs 3 --save-freq 2 --model-dir tie', flag)
    assert last_of('tie', 'best')['epoch'] == 1
    assert sorted(p.name for p in Path('tie').glob('*.pt')) == ['best.pt', 'epoch-2.pt', 'last.pt']


def test_the_log_describes_the_saved_weights_or_their_average():
    images, labels = data.load_data('own.npz', train=False, size=16)
    x = data.to_float(images)
    for flag, kind in (('', 'state_dict'), ('--ema 0.5', 'ema_state_dict')):
        train('trades', NET, '--augment none --epochs 3 --entropy-weight --tau 0.5', flag,
              '--model-dir', kind)
        model, row = models.build_model('net.py:Net', 5).eval(), last_of(kind)['log'][-1]
        model.load_state_dict(last_of(kind)[kind])
        data.seed(1, 0)
        logits = model(evaluate.pgd_attack(model, x, labels, 0.1, 0.1 / 4, 10))
        h, h_tau = evaluate.entropy(logits.double()), evaluate.entropy(logits.double() / 0.5)
        means = [v.double().mean().item() for v in (
            model(x).argmax(1) == labels, logits.argmax(1) == labels, h, h > 1.5)]
        sd = (h_tau / h_tau.mean()).std(correction=0).item()
        names = 'clean pgd10 entropy high_entropy sd_of_w'.split()
        assert [row[name] for name in names] == pytest.approx([*means, sd], abs=1e-5)
        assert sd > 0.01 and means[1] < means[0]


def test_the_validation_images_are_the_last_of_each_class_and_never_trained_on():
    trained, held = set(), set()
    with hooks(forward=lambda net, x: (trained if net.training else held).update(comparable([*x]))):
        train('trades', PLAIN, '--augment none --val-size 20 --epochs 1')
    images, labels = data.load_data('own.npz')
    classes = [comparable([*data.to_float(images[labels == k])]) for k in range(5)]
    last_4 = set(sum((images[-4:] for images in classes), []))
    assert len(last_4) == 20 and last_4 <= held and not last_4 & trained
    assert set(sum(classes, [])) - last_4 <= trained


def test_random_numbers_depend_on_seed_epoch_and_step_alone():
    def draws(seed):
        attack, dropout = [], []
        def forward(network, x):
            if network.training:
                dropout.append(comparable(F.dropout(torch.ones(99))))
            elif len(x) == 16:  # TRADES: the images, the start, and a step from it
                attack.append(x.detach())
        with hooks(forward=forward):
            train('trades', NET, f'--train-size 48 --epochs 3 --test-size 9 --seed {seed} '
                  f'--augment none --model-dir {seed}')
        starts = torch.stack([b - a for a, b in zip(attack[::3], attack[1::3])]).flatten(1)
        found = comparable(attack[::3]) + dropout
        assert len(set(found)) == len(found) == 9 + 18 and torch.pdist(starts).min() > 0.01
        return found
    first, other = draws(1), draws(2)
    os.rename('1', 'again')
    assert draws(1) == first and same_run('1', 'again') and not set(first) & set(other)


def test_learning_rates_of_each_schedule():
    for flags, rate in (('--lr-milestones 1 3', lambda t: 2 * 0.1 ** ((t >= 1) + (t >= 3))),
                        ('--lr-schedule cosine', lambda t: 1 + math.cos(math.pi * t / 4)),
                        ('--lr-schedule onecycle', lambda t: 2 * min(t / 1.6, (4 - t) / 2.4))):
        seen, directory = [], flags[5:].replace(' ', '-')
        with hooks(lambda optimizer, n: seen.append(optimizer.param_groups[0]['lr'])):
            train('at', PLAIN, f'--epochs 4 --lr 2 {flags} --model-dir {directory}')
        assert seen == pytest.approx([rate((i + 0.5) / 4) for i in range(16)])  # of the middles
        assert [row['lr'] for row in last_of(directory)['log']] == pytest.approx(seen[3::4])


# ---------------------------------------------------------------- killed and continued
@pytest.mark.parametrize('flags', [EACH_STEP, f'{EACH_STEP} {EVERYTHING}', '--save-freq 1'])
def test_a_run_killed_between_any_two_file_writes_continues_exactly(flags, monkeypatch):
    """Continue from copies of the directory, made before each file is put in place, as a kill would
    leave it; in every epoch, one copy is from the evaluation."""
    replace, copies = os.replace, []
    def copy_before(a, b):
        copies.append(shutil.copytree('run', f'killed-{len(copies)}'))
        replace(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', copy_before)
        train('gairat', NET, flags)
    for i, directory in enumerate(copies):
        with open(f'{directory}/log.csv', 'a') as log:
            log.write('2,0.02,1.2')  # cut off
        if os.path.exists(f'{directory}/last.pt'):
            out, _ = train('gairat', '--arch net.py:Net --resume', directory)
            assert ' -> ' not in out
        else:
            assert i < 4
            train('gairat', NET, flags, '--model-dir', directory)
        assert same_run(directory, 'run')
    assert len(copies) > (20 if EACH_STEP in flags else 8)


@pytest.mark.parametrize('algorithm, signals, step, saved, status', [
    ('at', 'TERM', 6, 6, 143), ('trades', 'INT', 4, 4, 130), ('mart', 'HUP', 8, 8, 129),
    ('at', 'TERM TERM', 6, 6, 143), ('at', 'INT INT', 6, 5, -2), ('at', 'KILL', 6, 5, -9)])
def test_a_run_ended_by_signals_continues_exactly(
        algorithm, signals, step, saved, status, runs, capfd):
    """The first signal ends a run after the step, saved; the last step of an epoch before its
    evaluation. A second Ctrl-C ends it at once. A second SIGTERM does not: cluster schedulers send
    it to each process, and torchrun sends it once more."""
    def send(optimizer, n):
        for name in signals.split() * (n == step):
            os.kill(os.getpid(), signal.Signals[f'SIG{name}'])
    child = in_child(algorithm, f'{NET} --entropy-weight {EACH_STEP * (status < 0)}', send)
    child.join(100)
    assert child.exitcode == status and 4 * last_of()['epoch'] + last_of()['step'] == saved
    assert status < 0 or capfd.readouterr().out.splitlines()[-1].endswith('--resume run')
    train(algorithm, '--resume run --arch net.py:Net')
    assert same_run('run', runs[f'ew-{algorithm}'])


def test_signals_ignored_by_nohup_stay_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with hooks(kill(signal.SIGHUP, 3)):
        train('at', PLAIN)


def test_flags_can_be_changed_on_resuming_and_are_listed(runs):
    shutil.copytree(runs['at'], 'run')
    resume = '--resume run --arch net.py:Net'
    assert 'finished' in train('at', resume)[0] and same_run('run', runs['at'])
    out, _ = train('at', f'{resume} --epochs 3 --lr 0.01 --ema 0.9 --wd 0.5')
    changes = ('epochs 2 -> 3', 'lr 0.1 -> 0.01', 'ema None -> 0.9', 'lr_milestones [2] -> [3]',
               'weight_decay 0.0005 -> 0.5')
    assert all(change in out for change in changes) and out.count(' -> ') == 5
    assert last_of()['optimizer']['param_groups'][0]['weight_decay'] == 0.5
    log = last_of()['log']
    assert log[2]['lr'] == 0.01 and log[2]['seconds'] > log[1]['seconds']
    assert log[2].keys() == log[1].keys()


def test_given_milestones_stay_when_a_resumed_run_gets_more_epochs():
    train('at', PLAIN, '--lr-milestones 1')
    train('at', '--arch net.py:plain --resume run --epochs 3')
    assert [row['lr'] for row in last_of()['log']] == pytest.approx([0.1, 0.01, 0.01])


def test_with_another_batch_size_a_resumed_run_begins_its_epoch_again():
    flags, steps = f'{PLAIN} --epochs 1 --lr 1e-9', []
    train('at', flags, '--batch-size 4 --model-dir whole')
    with hooks(kill(signal.SIGTERM, 9)):
        train('at', flags, '--batch-size 1', status=143)
    with hooks(lambda optimizer, n: steps.append(n)):
        out, _ = train('at', '--resume run --arch net.py:plain --batch-size 4')
    assert '0 epochs and 0 steps done' in out and 'batch_size 1 -> 4' in out
    assert len(steps) == 13 and losses_of() == pytest.approx(losses_of('whole'), abs=1e-5)


def test_the_logged_entropy_of_a_half_precision_network_is_exact():
    train('at', OWN, '--arch net.py:half --lr 1e-6')
    assert last_of()['log'][-1]['entropy'] == pytest.approx(math.log(5), abs=1e-5)


def test_a_run_that_cannot_be_continued_is_refused_by_name(runs):
    shutil.copytree(runs['at'], 'run')
    resume = '--arch net.py:Net --resume run'
    for flag in ('--model-dir', '--init-from'):
        assert flag in refused('at', resume, flag, 'run')
    os.rename('run/last.pt', 'last.pt')  # best.pt alone is a run as well
    assert 'contains a run' in refused('at', NET)
    os.rename('last.pt', 'run/last.pt')
    assert 'train_mart.py' in refused('mart', resume)
    for name, flag in (('at', '--resume'), ('evaluate', '--model-path')):
        assert '--arch' in refused(name, flag, 'run')  # a file must not choose the code that is run
    good = Path('run/last.pt').read_bytes()
    for content in (good[:-1000], b'', saved(last_of()['state_dict'])):
        Path('run/last.pt').write_bytes(content)
        assert 'run' in refused('at', resume)
    assert '/last.pt' in refused('at', '--resume=')


def test_a_directory_in_which_a_run_is_training_is_refused():
    told = []
    with hooks(lambda optimizer, n: n > 1 or told.append(refused('at', PLAIN))):
        train('at', PLAIN)
    assert 'another process' in told[0] and 'contains a run' in refused('at', PLAIN)


# ---------------------------------------------------------------- full disks and diverging runs
@pytest.mark.parametrize('function, name', [('replace', ''), ('fsync', ''), ('replace', 'best.pt')])
def test_training_continues_on_a_full_disk_and_saves_later(function, name, runs, monkeypatch):
    """The best.pt that is saved later holds the weights of epoch 1, not the current ones."""
    full = []
    def step(optimizer, n):  # full at the end of epoch 1 and in the first step of epoch 2
        full.append(n) if n == 4 else full.clear() if n == 6 else None
    full_disk(monkeypatch, lambda *args: full and str(args[-1]).endswith(name), function)
    with hooks(step):
        out, _ = train('at', NET, EACH_STEP)
    assert out.count('No space left') == 3 - bool(name) and same_run('run', runs['at'])
    assert last_of(name='best')['epoch'] == 1 and not list(Path('run').glob('*.tmp'))


@pytest.mark.parametrize('name', ['last.pt', 'log.csv', ''])
def test_a_disk_that_stays_full_gives_exit_status_1(name, monkeypatch):
    full_disk(monkeypatch, lambda a, b: b.endswith(name))
    out, err = train('at', PLAIN, status=1)
    assert 'No space left' in out and 'could not be saved' in err


@pytest.mark.parametrize('step, what', [(6, 'weight'), (8, 'weight'), (7, 'loss')])
def test_a_loss_or_weight_that_is_not_finite_ends_the_run_before_saving(step, what):
    """For 'loss', a frozen weight is NaN and the trained weights are restored to finite values."""
    kept = []
    def spoil(optimizer, n):
        weights = optimizer.param_groups[0]['params']
        if n == step - (what == 'loss'):
            kept.extend(p.detach().clone() for p in weights)
            weights[0 if what == 'weight' else -1].data[0] = math.nan
        for p, good in zip(weights[:-1], kept * (n == 7)):
            p.data.copy_(good)
    with hooks(spoil):
        _, err = train('at', NET, status=1)
    assert f'diverged by step {step - 4} of epoch 2' in err and '--lr' in err
    assert last_of()['step'] == 0 and comparable(last_of()) == comparable(last_of(name='best'))


# ---------------------------------------------------------------- several processes
# Batches of 23 in shares of 12 and 11, and a last one of a single image: one share is empty
SHARED = f'{PLAIN} --train-size 47 --batch-size 23'


@pytest.mark.parametrize('method', METHODS)
def test_two_processes_match_one(method):
    algorithm, flags = METHODS[method]
    flags = f'{SHARED} {flags} {EVERYTHING * (method == "ew-mart")} --model-dir'
    assert run_pair(algorithm, f'{flags} two') == [0, 0]
    train(algorithm, flags, 'one')
    one, two = last_of('one'), last_of('two')
    for k, v in one['state_dict'].items():
        assert torch.allclose(v, two['state_dict'][k], rtol=0, atol=1e-5), k
    for a, b in zip(one['log'], two['log'], strict=True):
        assert a['pgd10'] == b['pgd10'] and a['loss'] == pytest.approx(b['loss'], abs=1e-5)


def test_two_processes_stop_when_one_is_asked_to_and_continue_exactly():
    flags = f'{SHARED} --arch net.py:Net --batch-size 4'
    assert run_pair('at', f'{flags} --model-dir whole') == [0, 0]
    assert run_pair('at', flags, kill(signal.SIGTERM, 14)) == [143, 143]
    assert (last_of()['epoch'], last_of()['step']) == (1, 2)
    assert run_pair('at', '--resume run --arch net.py:Net') == [0, 0]
    assert same_run('run', 'whole')


# ---------------------------------------------------------------- mistakes
MISTAKES = [('at', *case) for case in [
    ('--dataset svhn', 'svhn'), ('--arch vgg', 'vgg'), ('--arch wideresnet29-10', 'wideresnet29'),
    ('--entropy', '--entropy'), ('--tau 2', '--entropy-weight'), ('--seed -1', 'seed'), *[
        (f'--epsilon {value}', '8/255') for value in ('8', '8/0', '0', 'nan')],
    ('--step-size x', 'pixels'), ('--ema 1', 'ema'), ('--awp-gamma -1', 'awp-gamma'),
    ('--awp-gamma 0.01', '--awp-warmup'),
    ('--compile fast', 'fast'),
    ('--lr-milestones 1 --lr-schedule cosine', 'needs --lr-schedule multistep'),
    ('--train-size 53', '52'), ('--test-size 21', '20'),
    ('--val-size 12', 'multiple'), ('--val-size 50', '50'), ('--val-size -5', 'val-size'),
    ('--extra-data extra.npz --batch-size 1', 'original and extra'),
    ('--extra-data none.npz', 'none.npz'), ('--init-from none.pt', 'none.pt'),
    ('--dataset none.npz', 'none.npz'), ('--dataset mnist --data-dir net.py', 'net.py'),
    ('--model-dir /dev/null/run', '/dev/null'), ('--arch smallcnn', '8, 8'),
    ('--arch none.py:Net', 'none.py'), ('--arch net.py:Nope', 'Nope'),
    ('--arch net.py:raises', 'division by zero'), ('--arch net.py:eleven', '11'),
    ('--arch net.py:colored', '(3, 1, 8, 8)'), ('--arch net.py:number', 'net.py:number'),
    ('--arch net.py:tuple', 'train mode'), ('--arch net.py:detach', 'gradient'),
    ('--arch net.py:root', 'finite gradient'),
    ('--arch net.py:change', 'in-place'), ('--arch net.py:buffer', 'extra'),
    ('--arch net.py:norm --train-size 1', '(1, 1, 8, 8)'), *[
        (f'{flag} {value}', '') for value in ('0', '-1', 'nan', 'many') for flag in (
            '--lr', '--entropy-weight --tau', '--batch-size', '--epochs', '--num-steps',
            '--extra-data extra.npz --extra-fraction')]]] + [
    ('gairat', '--begin-epoch 111', '--begin-epoch')]


@pytest.mark.parametrize('algorithm, flags, told', MISTAKES)
def test_a_user_error_gives_one_line_and_writes_nothing(algorithm, flags, told):
    assert told in refused(algorithm, PLAIN, flags)


GRAY = np.random.default_rng(0).integers(256, size=(52, 8, 8, 1), dtype=np.uint8)
LABELS = np.arange(52) % 5


@pytest.mark.parametrize('changed, told', [
    ({'train_images': GRAY.transpose(0, 3, 1, 2)}, '(N, H, W, C)'),
    ({'train_images': GRAY % 2}, '0 to 255'), ({'train_images': GRAY / 255}, 'float64'),
    ({'train_labels': LABELS + 1}, '0 to K - 1'), ({'train_labels': LABELS * 2}, '0 to K - 1'),
    ({'train_labels': LABELS - 1}, 'whole'), ({'train_labels': LABELS * 1.0}, 'whole'),
    ({'test_labels': LABELS}, '(52'), ({'test_labels': LABELS[:20] + 1}, 'or classes'),
    ({'train_labels': LABELS * 0}, 'or classes'),
    ({'test_images': GRAY[:20, :7]}, 'differ in shape'),
    ({'test_images': np.array([None] * 20)}, 'test_images'),
    ({'image': GRAY[:30, :7]}, 'extra.npz'), ({'label': LABELS[:30] + 1}, 'extra.npz'),
    ({'image': GRAY[:0], 'label': LABELS[:0]}, 'extra.npz')])
def test_invalid_images_are_refused(changed, told):
    own_images(**changed)
    assert told in refused('at', PLAIN, '--extra-data extra.npz')


def test_the_first_images_of_a_file_that_is_sorted_by_class_are_refused():
    own_images(train_labels=np.sort(LABELS), test_labels=np.sort(LABELS[:20]))
    for name in ('train', 'test'):
        assert 'sorted by class' in refused('at', PLAIN, f'--{name}-size 10')
    train('at', PLAIN, '--test-size 20')


@every_algorithm
def test_help_shows_the_values_that_will_be_used(algorithm):
    out, _ = train(algorithm, '--help --dataset digits')
    assert 'None' not in out and '--resume DIR' in out
    for value in ('0.1', '0.04', '14', '0.03', 'onecycle', 'smallcnn'):
        assert f'(default: {value})' in ' '.join(out.split())
    assert 'cifar10 8/255' in command('--help')[0]


# ---------------------------------------------------------------- own networks, images and weights
def test_a_custom_network_receives_contiguous_images():
    images = GRAY.repeat(3, 3)  # of one channel in the other tests
    own_images(train_images=images, test_images=images[:20])
    Path('net.py').write_text(NETS.replace('Conv2d(1', 'Conv2d(3'))
    train('at', NET, '--epochs 1 --ema 0.9')


def test_extra_images_fill_their_share_of_each_batch_and_are_drawn_evenly():
    batches = []
    images, extra = data.load_data('own.npz')[0], data.load_npz('extra.npz', 'image', 'label')[0]
    ids = {key: i for i, key in enumerate(comparable([*data.to_float(torch.cat([images, extra]))]))}
    with hooks(forward=lambda net, x: batches.append([*map(ids.get, comparable([*x]))])):
        train('trades', PLAIN, '--augment none --batch-size 10 --test-size 9 '
              '--extra-data extra.npz')
    clean = [batch for batch in batches if None not in batch][::2]  # for the attack and the loss
    assert len(clean) == 2 * 6  # as many steps as without extra images
    for epoch in (clean[:6], clean[6:]):
        assert {sum(i >= 52 for i in batch) for batch in epoch} == {7}
        counts = np.bincount(sum(epoch, []), minlength=82)
        assert set(counts[:52]) == {0, 1} and set(counts[52:]) == {1, 2}  # 42 draws of 30
    assert clean[:6] != clean[6:]


@pytest.mark.parametrize('start', ['ew-at', 'ew-at/last.pt', 'bare.pt'])
def test_a_run_starts_from_the_weights_of_a_file_or_of_another_run(start, runs):
    weights = last_of(runs['ew-at'], 'last' if '.pt' in start else 'best')['state_dict']
    torch.save({f'module.{k}': v for k, v in weights.items()}, 'bare.pt')
    start, seen = 'bare.pt' if start == 'bare.pt' else runs['ew-at'].parent / start, []
    with hooks(forward=lambda net, x: seen.append(copy.deepcopy(net.state_dict()))):
        train('trades', NET, '--init-from', start)
    assert all(torch.equal(v, weights[k]) for k, v in seen[0].items())
    os.remove('bare.pt')
    train('trades', '--resume run --epochs 3 --arch net.py:Net')  # does not need the file
    torch.save(models.build_model('net.py:eleven').state_dict(), 'w.pt')
    assert 'w.pt: Error' in refused('at', NET, '--model-dir new --init-from w.pt')


def test_directory_names_contain_each_flag_that_changes_the_result():
    def name(flags, algorithm='trades'):
        return flags_of(algorithm, flags).model_dir
    assert name('') == name('--lr 0.1 --batch-size 128') == 'runs/cifar10-trades-seed1'
    assert name('--entropy-weight --beta 5.5') == 'runs/cifar10-ew-trades-beta5.5-seed1'
    flags = """epochs 30, num-steps 7, batch-size 64, train-size 9, test-size 9, val-size 10,
        beta 5, beta 5.5, epsilon 4/255, epsilon 0.03, step-size 0.003, augment crop, augment none,
        amp, extra-data x/a.npz, extra-data x/b.npz, extra-fraction 0.5, arch resnet18, arch n.py:A,
        init-from a/last.pt, init-from b/last.pt, init-from r/s-seed1, init-from r/s-seed2, lr 0.2,
        lr-schedule cosine, lr-schedule onecycle, lr-milestones 3 4, lr-milestones 34, momentum 0.8,
        lr-milestones, seed 2, weight-decay 2e-4, awp-gamma 0.005, awp-gamma 0.01, awp-warmup 3,
        ema 0.995, ema 0.99, dataset mnist, dataset digits, dataset own.npz, no-amp, compile,
        entropy-weight, entropy-weight --tau 2, entropy-weight --tau inf, compile max-autotune"""
    flags = [' '.join(flag.split()) for flag in flags.split(',')]
    others = 'save-freq 3', 'data-dir x', 'no-cuda', 'save-every-minutes 1'
    names = {name(f'--{flag}') for flag in flags} | {name('')}
    assert len(names) == len(flags) + 1 and all(re.fullmatch(r'runs/[\w.-]+', n) for n in names)
    assert {name(f'--{flag}') for flag in others} == {name('')}
    tested = {flag.split()[0].replace('-', '_') for flag in (*flags, *others)} - {'no_amp'}
    assert {*vars(flags_of('trades', ''))} - tested == {'resume', 'model_dir', 'tau'}
    assert '3' in name('--begin-epoch 3', 'gairat') and '2.5' in name('--psi 2.5', 'gairat')


def test_three_files_train_a_network_with_both_outputs_closed():
    for name in ('train_trades.py', 'models.py', 'data.py'):
        shutil.copy(ROOT / name, '.')
    command = f'{sys.executable} train_trades.py {SHORT} --dataset digits --train-size 52 >&- 2>&-'
    assert subprocess.run(command, shell=True).returncode == 0 and last_of()['epoch'] == 2


# ---------------------------------------------------------------- AWP, averaged weights, speed
def test_weight_perturbation_moves_weights_along_their_gradient_and_is_undone_exactly():
    model, x = models.build_model('wideresnet10-1').double(), torch.rand(3, 3, 8, 8).double()
    before = copy.deepcopy(model.state_dict())
    statistics = models.snapshot(model.buffers())
    F.cross_entropy(model(x), torch.arange(3)).backward()
    models.restore(statistics)
    kept = models.perturb_weights(model, 0.02)
    for name, p in model.named_parameters():
        moved = before[name] + 0.02 * before[name].norm() / p.grad.norm() * p.grad
        assert torch.allclose(p, moved, atol=1e-9) if p.dim() > 1 else p.equal(before[name]), name
    models.restore(kept)
    assert comparable(model.state_dict()) == comparable(before)


def test_a_step_takes_the_gradient_at_the_perturbed_weights_and_ema_averages_the_result():
    """AWP skips a layer without gradient, and a frozen weight stays."""
    passes, states = [], []
    def forward(network, x):
        if network.training:
            passes.append((copy.deepcopy(network), x.clone()))
    def step(optimizer, n):
        states.append([copy.deepcopy((p, p.grad, optimizer.state.get(p, {}).get('momentum_buffer')))
                       for p in optimizer.param_groups[0]['params']])
    with hooks(step, forward):
        train('at', NET, '--batch-size 26 --lr 0.5 --wd 0.1 --entropy-weight --awp-gamma 0.1 '
              '--awp-warmup 1 --ema 0.8')
    assert len(passes) == 2 + 2 * 2  # AWP from the second epoch on
    (first, x), (moved, x_again) = passes[2:4]
    assert torch.equal(x, x_again)
    for (name, p), q, (before, _, buffer), (after, grad, _) in zip(
            first.named_parameters(), moved.parameters(), states[1], states[2], strict=True):
        still = name.startswith(('unused', 'frozen'))
        distance = 0 if p.dim() == 1 or still else 0.1 * p.norm().item()
        stepped = p if still else p - 0.5 * (0.9 * buffer + grad + 0.1 * p)
        assert torch.equal(p, before) and torch.allclose(after, stepped, atol=1e-6), name
        assert (q - p).norm().item() == pytest.approx(distance, rel=1e-3), name
    ema, last = (last_of()[kind] for kind in ('ema_state_dict', 'state_dict'))
    for (k, _), *after in zip(first.named_parameters(), *states):
        average = after[0][0]  # the weights before the first step do not count
        for p, _, _ in after[1:]:
            average = 0.8 * average + 0.2 * p
        assert torch.allclose(average, ema[k], atol=1e-6), k
    assert all(torch.equal(ema[k], last[k]) for k in ema if 'running' in k or 'tracked' in k)
    assert last['bn.num_batches_tracked'] == 4  # once a step, with AWP too


def test_a_step_uses_the_mean_loss_of_the_batch_and_logs_it():
    passes, grads = [], []
    with hooks(lambda optimizer, n: grads.extend(optimizer.param_groups[0]['params']),
               lambda net, x: net.training and passes.append((copy.deepcopy(net), x.detach()))):
        train('at', PLAIN, '--augment none --batch-size 52 --epochs 1 --entropy-weight --tau 2')
    ((net, x_adv),), (images, labels) = passes, data.load_data('own.npz')
    y = labels[torch.cdist(x_adv.flatten(1), data.to_float(images).flatten(1)).argmin(1)]
    loss = train_at.at_loss(net, x_adv, y, None, entropy_weight=True, tau=2, adv=x_adv)
    loss.backward()
    assert losses_of() == pytest.approx([loss.item()], rel=1e-5)
    assert all(torch.allclose(p.grad, q.grad, rtol=1e-4) for p, q in zip(net.parameters(), grads))


def test_bfloat16_agrees_within_its_precision_and_uses_current_weights(runs):
    model, x = models.build_model('wideresnet10-1', 10, 1).eval(), torch.rand(8, 1, 8, 8)
    with torch.no_grad():
        full = model(x)
        models.accelerate(model, amp=True)
        half = model(x)
        model.fc.bias += 1
        assert torch.allclose(model(x), half + 1, atol=0.02) and half.dtype == torch.float32
    assert torch.allclose(full, half, atol=0.02) and not torch.equal(full, half)
    train('at', NET, '--amp')
    full, half = losses_of(runs['at']), losses_of()
    assert half == pytest.approx(full, rel=0.05) and half != full


def test_a_run_compiles_its_network_only_in_the_first_epoch(monkeypatch, runs):
    graphs, after, compiler = [], [], torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, mode, dynamic: compiler(
        f, dynamic=dynamic, backend=lambda graph, x: graphs.append(graph) or graph.forward))
    with hooks(lambda optimizer, n: after.append(len(graphs))):
        train('at', NET, '--compile --ema 0.9')
    assert 0 < after[0] and after[4] == after[-1] == len(graphs) <= 6  # nor for a last batch of 4
    assert losses_of() == losses_of(runs['at'])


def test_outputs_are_copied_before_a_cuda_graph_overwrites_them(monkeypatch):
    model, x = models.build_model('wideresnet10-1'), torch.rand(4, 3, 8, 8)
    memory = torch.empty(4, 10)
    monkeypatch.setattr(torch, 'compile', lambda f, **options: lambda x: memory.copy_(f(x)))
    models.accelerate(model.eval(), False, 'reduce-overhead', {4})
    with torch.no_grad():
        first, kept = model(x), memory.clone()
        assert model(1 - x).equal(memory) and first.equal(kept) and len(model(x[:3])) == 3


# ---------------------------------------------------------------- on a GPU
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
GPU = NET.replace('--no-cuda', '')


@pytest.mark.parametrize('device', ['meta', pytest.param('cuda', marks=on_a_gpu)])
@every_algorithm
def test_a_step_mixes_no_devices_and_matches_the_cpu(algorithm, device):
    """Also on the meta device, which holds no data but, like a GPU, does not mix with the CPU."""
    found, index, train_x = [], data.draw(9, 12), script(algorithm)
    model, images = models.build_model('wideresnet10-1').double(), torch.randint(256, (9, 3, 8, 8))
    for place in ('cpu', device):
        net, x = copy.deepcopy(model).to(place), images.to(place, torch.uint8)[index.to(place)]
        x, y = data.to_float(x, net.memory_format).double(), index.to(place) % 9
        adv = train_x.attack(net, x, (x + 0.01).clamp(0, 1), y, 0.01, 0.03, 2)
        loss = train_x.loss_function(net, x, y, None, adv=adv, perturb_steps=2, entropy_weight=True)
        loss.backward()
        models.restore(models.perturb_weights(net, 0.1))
        models.average(copy.deepcopy(net), net, 0.9)
        train_x.random_start(data.to_float(data.augment(x.byte(), 'crop-flip')), 0.1)
        assert (loss.device.type, loss.dtype, loss.shape) == (place, torch.float64, ())
        found.append([loss, *(p.grad.norm() for p in net.parameters())])
    assert device == 'meta' or torch.allclose(*(torch.stack(f).cpu() for f in found), rtol=1e-6)


@on_a_gpu
@every_algorithm
def test_a_step_on_a_gpu_does_not_wait(algorithm):
    def step(optimizer, n):  # the loss is reported after every fourth step
        torch.cuda.set_sync_debug_mode('error' if n % 4 else 'default')
    with hooks(step):
        train(algorithm, GPU, EVERYTHING, '--train-size 48 --batch-size 3')


@on_a_gpu
@pytest.mark.parametrize('flags', ['--no-amp', '--amp', '--compile', f'--compile {EVERYTHING}'])
def test_a_run_on_a_gpu_continues_and_resembles_one_on_the_cpu(flags):
    train('trades', NET, flags.replace('--compile', ''), '--no-amp --model-dir cpu')
    with hooks(kill(signal.SIGTERM, 6)):
        train('trades', GPU, flags, status=143)
    train('trades', '--resume run --arch net.py:Net')
    assert losses_of() == pytest.approx(losses_of('cpu'), rel=0.1)
    assert last_of()['device'] == 'cuda'


def refuses(told, function, *args, **options):
    """The function raises an error of one line that matches."""
    with pytest.raises((ValueError, OSError, argparse.ArgumentTypeError), match=told) as error:
        function(*args, **options)
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------- networks
CIFAR10, CIFAR100 = models.NORMALIZATIONS.values()


@torch.no_grad()
@pytest.mark.parametrize('arch, options, expected', [
    ('preactresnet18', (10, 3, False), [1.25812, 0.828191]),
    ('preactresnet18', (7, 1), [-15.251, 17.1457]), ('resnet18', (7, 1), [-2.26427, 4.71646]),
    ('preactresnet18-raw', (), [4.43668, -2.9881]), ('resnet34', (), [-8.83816, 13.2101]),
    ('resnet50', (), [164.356, -40.1942]), ('wideresnet16-2', (100,), [3.80279, 0.478545]),
    ('preactresnet18-swish', (), [-3.56069, 5.37444]),
    ('wideresnet16-2-swish', (), [-0.982352, 4.19322]),
    ('wideresnet10-1-swish', (100,), [-0.400249, 2.48945]),
    ('wideresnet10-1-swish', (10, 1), [-0.462003, 2.48223])])
def test_names_and_logits_are_those_of_the_published_networks(arch, options, expected):
    """Each weight follows from its name. The first two logits were computed by a forward pass that
    was written from RobustBench's code and DeepMind's, in float64."""
    model = models.build_model(arch, *options)
    for name, v in model.state_dict().items():
        wave = torch.sin(torch.arange(v.numel()).double() + zlib.crc32(name.encode()) % 1000)
        scale = (2 / v[:1].numel()) ** 0.5 if v.dim() > 1 else 0.5
        v.copy_(scale * wave.view(v.shape) + (v.dim() < 2))
    torch.save(model.state_dict(), 'a.pt')
    loaded = models.load_model('a.pt', arch if arch.endswith('raw') else None).double()
    channels = options[1] if len(options) > 1 else 3
    x = torch.linspace(0, 1, channels * 256).double().view(1, channels, 16, 16)
    assert loaded(x)[0, :2].tolist() == pytest.approx(expected, rel=1e-4)


def test_smallcnn_starts_with_zero_logits_and_has_the_names_of_trades():
    model = models.build_model('smallcnn', 7, 1)
    assert not model(torch.rand(2, 1, 28, 28)).any()
    assert ' '.join(name[:-7] for name in model.state_dict() if 'weight' in name) == (
        'feature_extractor.conv1 feature_extractor.conv2 feature_extractor.conv3 '
        'feature_extractor.conv4 classifier.fc1 classifier.fc2 classifier.fc3')


# ---------------------------------------------------------------- files of weights
@pytest.fixture(scope='module')
def network():
    model = models.build_model('wideresnet10-1')
    model(torch.rand(64, 3, 8, 8))
    return model.eval()


class Config(dict):  # as EasyDict and ConfigDict
    pass


def prefixed(prefix):
    return lambda s: {f'{prefix}{k}': v for k, v in s.items()}


KEYS = 'state_dict', 'model_state_dict', 'net', 'model', 'rmodel', 'weights', 'best', 'last'
WRAPS = {
    'bare': dict, 'nested': lambda s: {'model': {'state_dict': s}}, 'of a dict subclass': Config,
    **{key: lambda s, key=key: {key: s, 'acc': 93.1} for key in KEYS},
    **{key: lambda s, key=key: {key: {'n_averaged': torch.tensor(3)} | prefixed('module.')(s),
                                'state_dict': {k: 0 * v for k, v in s.items()}}
       for key in ('ema_state_dict', 'model_ema')},
    'a name and a module': lambda s: {'model': 'wideresnet', 'net': nn.ReLU(), 'last': s},
    **{prefix: prefixed(prefix) for prefix in (
        'module.', '_orig_mod.', 'module.0.', 'wrapper.of.it.', 'model.module.0._orig_mod.')},
    "TRADES' dead block": lambda s: s | {f'sub_{k}': v for k, v in s.items() if 'block1' in k},
    'no counters': lambda s: {k: v for k, v in s.items() if 'num_batches' not in k},
    'parameters': lambda s: {k: nn.Parameter(v.double(), False) for k, v in s.items()},
    'many kinds beside': lambda s: {
        'net': s, 'a': np.float64(1), 'b': np.arange(3), 'c': collections.defaultdict(list, x=[1]),
        'd': Config(a=Config(b=1)), 'e': Path('a/b'), 'f': argparse.Namespace(lrs=[0.1, None]),
        'g': {1, frozenset('a')}, 'h': [slice(2), range(3), 1j], 'i': collections.Counter('ab'),
        'j': collections.deque([1]), 'k': torch.optim.SGD([torch.zeros(1)], 0.1), Path(): 1}}


@pytest.mark.filterwarnings('ignore:.*source code of')
@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('wrap', WRAPS)
def test_weights_are_found_in_any_wrapping(wrap, zipped, network):
    torch.save(WRAPS[wrap](network.state_dict()), 'a.pt', _use_new_zipfile_serialization=zipped)
    loaded = models.load_model('a.pt')
    assert not loaded.training and loaded.memory_format == torch.channels_last
    for k, v in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[k], v) or wrap == 'no counters' and 'num_b' in k


def saved(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return exec, ('open("ran", "w")',)


def archive(pickled):
    with zipfile.ZipFile(buffer := io.BytesIO(), 'w') as file:
        file.writestr('a/data.pkl', b'\x80\x04' + pickled)
        file.writestr('a/version', '3')
    return buffer.getvalue()


CHANGE = b'\nN}(S"dump_patches"\nI01\nS"__defaults__"\n(I1\ntu\x86b.'  # sets two attributes
ATTACKS = [saved({'x': Evil()}), saved({'x': Evil()}, False), pickle.dumps(Evil(), 0),
           pickle.dumps(Evil(), 5), archive(b'cos\nsystem\n(S"touch ran"\ntR.'),
           archive(b'ctorch\nctypes.cdll.no.Storage\n.'), archive(b'ctorch\nTypedStorage' + CHANGE),
           archive(b'ctorch\nFloatStorage' + CHANGE),
           archive(b'ctorch._utils\n_rebuild_tensor_v2' + CHANGE)]


@pytest.mark.parametrize('attack', range(len(ATTACKS)))
def test_a_checkpoint_can_neither_run_code_nor_change_torch(attack):
    Path('a.pt').write_bytes(ATTACKS[attack])
    rebuild = torch._utils._rebuild_tensor_v2.__defaults__
    try:
        models.load('a.pt')
    except ValueError as error:
        assert '\n' not in str(error) and 'shared object' not in str(error)  # dlopen's
    assert not Path('ran').exists() and torch._utils._rebuild_tensor_v2.__defaults__ == rebuild
    assert not hasattr(torch.TypedStorage, 'dump_patches')


@torch.no_grad()
def test_a_run_of_this_project_is_loaded_with_its_own_network_and_pixels():
    net, x = models.build_model('preactresnet18-raw').eval(), torch.rand(2, 3, 8, 8)
    content = dict(algorithm='AT', arch='PreActResNet', state_dict=net.state_dict())
    torch.save(content, 'a.pt')  # another project's
    assert torch.equal(models.load_model('a.pt', 'preactresnet18-raw')(x), net(x))
    content |= dict(algorithm='at', arch='preactresnet18-raw', args={})
    torch.save(content, 'a.pt')
    for arch in (None, 'preactresnet18', 'net.py:Net'):  # meant for other files of the command
        assert torch.equal(models.load_model('a.pt', arch, 10, CIFAR10)(x), net(x))
    torch.save(content | {'arch': 'elsewhere/net.py:Net'}, 'a.pt')
    refuses('^a.pt: was trained with --arch elsewhere/net.py:Net', models.load_model, 'a.pt',
            'net.py:plain')


TENSOR, OLD, SELF = saved({'w': torch.zeros(3000)}), saved({'w': torch.zeros(3000)}, False), {}
SELF['model'] = SELF
UNREADABLE = {
    'empty': b'', 'text': b'hello\nworld\n', 'a page': b'<!DOCTYPE html>', 'zeros': bytes(100),
    **{f'zip cut at {at}': TENSOR[:at] for at in (3, 10, 500, 9000, -1)},
    **{f'legacy cut at {at}': OLD[:at] for at in (20, 200, 9000, -1)},
    **{f'of {content}': saved(content) for content in (
        nn.Linear(2, 2), {'net': nn.Linear(2, 2)}, [1, 2], {'state_dict': [{'w': torch.zeros(1)}]},
        3, None, torch.zeros(3), {}, {1: torch.zeros(3)}, SELF, {'foo': torch.zeros(1)})}}


@pytest.mark.parametrize('case', UNREADABLE)
def test_a_file_without_weights_is_refused_in_one_line(case, recwarn):
    Path('a.pt').write_bytes(UNREADABLE[case])
    refuses('^a.pt', models.load_model, 'a.pt')
    assert not recwarn.list


def test_a_flipped_bit_is_detected(network):
    content = bytearray(saved(network.state_dict()))
    content[content.index(network.fc.weight.detach().numpy().tobytes())] ^= 1
    Path('a.pt').write_bytes(content)
    refuses('a.pt .*damaged', models.load_model, 'a.pt')


@pytest.mark.parametrize('change, arch, told', [
    ({'bn1.bias': None}, None, 'Missing.*: "bn1.bias"'),
    ({'more': torch.ones(1)}, None, 'Unexpected.*: "more"'),
    ({'bn1.bias': torch.zeros(3)}, None, r'mismatch for bn1.bias.*\[3\].*\[64\]'),
    ({'bn1.bias': torch.full((64,), math.nan)}, None, 'not finite'),
    ({}, 'resnet18', 'Missing'), ({}, 'vgg', "unknown .*'vgg'")])
def test_weights_that_do_not_fit_are_named(change, arch, told, network):
    state = network.state_dict() | change
    torch.save({k: v for k, v in state.items() if v is not None}, 'a.pt')
    refuses(f'^a.pt: .*{told}', models.load_model, 'a.pt', arch)
    refuses('^a.pt: has 10 classes, not 11', models.load_model, 'a.pt', num_classes=11)


@torch.no_grad()
@pytest.mark.parametrize('names', [
    'mu sigma ', 'normalize.mean normalize.std model.', '0.mean 0.std 1.', 'mean std model.',
    'module.mu module.sigma module.net.'])
def test_a_normalization_in_the_file_is_used(names, network):
    (mean, std, prefix), x = names.split(' '), torch.rand(3, 3, 8, 8)
    mu = torch.tensor(CIFAR10[0]).view(1, 3, 1, 1)
    state = prefixed(prefix)(network.state_dict()) | {mean: mu, std: torch.tensor([0.5])}
    torch.save(state, 'a.pt')
    for normalize in (None, CIFAR100):  # what the file holds comes first
        loaded = models.load_model('a.pt', None, 10, normalize)
        torch.testing.assert_close(loaded(x), network((x - mu) / 0.5))
    refuses('^a.pt .*normalization', models.start_from, network, 'a.pt')
    torch.save(state | {std: torch.tensor([0.0])}, 'a.pt')
    refuses('^a.pt: .*normalized', models.load_model, 'a.pt')


@torch.no_grad()
@pytest.mark.parametrize('text, mean, std', [('cifar100', *CIFAR100), ('0.5/0.2', [0.5], [0.2])])
def test_normalization_by_the_caller_replaces_the_one_in_the_network(text, mean, std, network):
    swish, x = models.build_model('wideresnet10-1-swish').eval(), torch.rand(2, 3, 8, 8)
    mean, std, own_mean, own_std = (torch.tensor(v)[:, None, None] for v in (mean, std, *CIFAR10))
    normalized = (x - mean) / std
    for model, x_in in (network, normalized), (swish, normalized * own_std + own_mean):
        torch.save(model.state_dict(), 'a.pt')
        loaded = models.load_model('a.pt', normalize=models.mean_and_std(text))
        torch.testing.assert_close(loaded(x), model(x_in))


# ---------------------------------------------------------------- data sets
def test_digits():
    (images, labels), held_out = data.load_data('digits'), data.load_data('digits', train=False)
    assert images.shape == (1437, 1, 28, 28) and held_out[0].shape == (360, 1, 28, 28)
    assert images.dtype == torch.uint8 and images.max() == 255 and labels.dtype == torch.int64
    assert set(labels.tolist()) == {*range(10)}
    assert torch.equal(data.load_data('digits', size=7)[0], images[:7])


@pytest.mark.skipif(not (ROOT / 'data/MNIST').is_dir(), reason='needs MNIST and CIFAR-10 in ./data')
def test_mnist_and_cifar10():
    images, labels = data.load_data('mnist', ROOT / 'data', train=False)
    assert images.shape == (10000, 1, 28, 28) and labels[:4].tolist() == [7, 2, 1, 0]
    images, labels = data.load_data('cifar10', ROOT / 'data', size=3)
    assert images.shape == (3, 3, 32, 32) and images[0, :, 0, 31].tolist() == [148, 124, 103]
    assert labels.tolist() == [6, 9, 9] and images.is_contiguous()


@pytest.mark.parametrize('dataset, file', [
    ('cifar10', 'cifar-10-batches-py/data_batch_3'), ('cifar100', 'cifar-100-python/test'),
    ('mnist', 'MNIST/raw/train-images-idx3-ubyte')])
def test_a_data_set_with_a_missing_or_damaged_file_is_named(dataset, file, monkeypatch):
    monkeypatch.setattr('urllib.request.urlopen', Mock(side_effect=OSError('no network')))
    told = rf'^{dataset} is missing or damaged in data .* downloaded \(.+\).*digits'
    refuses(told, data.load_data, dataset, 'data')
    os.makedirs(os.path.dirname(f'data/{file}'), exist_ok=True)
    Path(f'data/{file}').write_bytes(bytes(100))
    refuses(told, data.load_data, dataset, 'data')


def test_each_image_is_cropped_and_flipped_independently():
    size, count = 8, 8100
    images = torch.randint(1, 256, (count, 3, size, size), dtype=torch.uint8)
    kept = images.clone()
    out = data.augment(images, 'crop-flip')
    matches = torch.zeros(81, 2, count)
    for offset in range(81):
        crop = TF.crop(TF.pad(images, [4]), offset // 9, offset % 9, size, size)
        for flip, variant in enumerate((crop, TF.hflip(crop))):
            matches[offset, flip] = (variant == out).flatten(1).all(1)
    assert (matches.sum((0, 1)) == 1).all() and out.dtype == torch.uint8 and images.equal(kept)
    counts = matches.sum(2)
    assert 15 <= counts.min() and counts.max() <= 85  # 50 expected, standard deviation 7
    assert abs(counts.sum(0) - count / 2).max() < 225  # standard deviation 45


ENV = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


def table(out, number=0):
    """A table in stdout: {model: {column: text}}."""
    head, _, *lines = [line.strip('| ').split(' | ') for line in
                       re.findall(r'(?:^\|.*\n)+', out, re.M)[number].splitlines()]
    return {line[0]: dict(zip(head[1:], line[1:])) for line in lines}


def affine(weight, bias, scale=1.0):
    """A network whose logits are scale * (W x + b), for images of any shape."""
    layer = nn.Linear(*weight.T.shape)
    layer.weight.data, layer.bias.data = scale * weight, scale * bias
    return nn.Sequential(nn.Flatten(), layer)


def digits(size):
    return data.load_data('digits', train=False, size=size)


@pytest.fixture(scope='module')
def trained():
    """A SmallCNN trained on clean digits for a moment: accurate, but not robust."""
    torch.manual_seed(0)
    images, labels = data.load_data('digits')
    model = models.build_model('smallcnn', in_channels=1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for index in torch.randint(len(images), (80, 32)):
        optimizer.zero_grad()
        F.cross_entropy(model(data.to_float(images[index])), labels[index]).backward()
        optimizer.step()
    return model.eval()


def make_run(directory, model, scale=1.0, **settings):
    """A run directory as training leaves it."""
    os.makedirs(directory)
    state = {k: v * scale if 'fc3' in k else v for k, v in model.state_dict().items()}
    torch.save(dict(state_dict=state, arch='smallcnn', dataset='digits', num_classes=10,
                     algorithm='at', args=settings, log=[]), f'{directory}/best.pt')
    return directory


@pytest.fixture
def run(trained):
    return make_run('digits-at-seed1', trained)


def linear_network(change='logits', before='x', num_classes=5):
    """Flags to evaluate net.py:linear with attacks; what it computes is in a module it imports."""
    sys.modules.pop('helper', None)
    Path('helper.py').write_text('import torch\ncalls = []\n'
                                 f'change, before = lambda logits: {change}, lambda x: {before}\n')
    torch.manual_seed(1)
    torch.save({'weight': torch.randn(num_classes, 64), 'bias': torch.zeros(num_classes)}, 'own.pt')
    return '--model-path own.pt --arch net.py:linear --dataset own.npz --epsilon 0.05 --attacks'


# ---------------------------------------------------------------- attacks
@pytest.mark.parametrize('attack', evaluate.PGD)
def test_a_linear_model_has_its_exact_robust_accuracy(attack):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8)
    x, w = data.to_float(images).flatten(1), torch.randn(16)
    b = -(x @ w).median()
    model = affine(torch.stack([-w / 2, w / 2]), torch.stack([-b / 2, b / 2]))
    labels = (x @ w + b > 0).long()
    labels[:5] = 1 - labels[:5]
    # The worst point within 0.1 of x and in [0, 1] is a corner of that box
    sign = (2 * labels - 1)[:, None]
    worst = (x - 0.1 * sign * w.sign()).clamp(0, 1)
    robust = ((worst @ w + b) * sign[:, 0] > 0).numpy()
    x_adv = evaluate.run_attack(attack, model, x.view(60, 1, 4, 4), labels, 0.1)
    torch.testing.assert_close(x_adv.flatten(1), worst, atol=1e-6, rtol=0)
    outcome = evaluate.evaluate_attack(model, images, labels, attack, 0.1, batch_size=25)
    assert (outcome['correct'] == robust).all() and 5 < robust.sum() < 40


@pytest.mark.parametrize('attack, share, steps', [
    ('fgsm', 1, 1), ('pgd10', 1 / 4, 10), ('pgd20', 1 / 10, 20), ('pgd100', 1 / 4, 100),
    ('ls', 1 / 10, 20)])
def test_steps_scale_with_epsilon(attack, share, steps):
    model, seen = affine(torch.tensor([[0.0] * 9, [0.01] * 9]), torch.tensor([9.0, 0.0])), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    x, y, kappa = torch.full((4, 1, 3, 3), 0.5), torch.zeros(4).long(), torch.zeros(4)
    seen.append(evaluate.run_attack(attack, model, x, y, 0.3, kappa=kappa))
    assert (seen[1] - seen[0]).abs().max().item() == pytest.approx(share * 0.3, rel=1e-4)
    assert len(seen) == steps + 1 and kappa.tolist() == [steps] * 4  # all iterates are correct


def test_logit_scaling_finds_what_masked_gradients_hide_from_pgd():
    """Raising the pixel by 0.09 gives class 1, but with tiny logits the softmax is flat and eight
    far classes, which pull the other way, outweigh class 1: PGD misses the example."""
    model = affine(torch.tensor([[0.0]] + [[1.0]] + [[-1.0]] * 8),
                   torch.tensor([0.0] + [-0.09 - 0.5] + [-1000.0] * 8), 1e-3)
    images, labels = torch.full((100, 1, 1, 1), 127, dtype=torch.uint8), torch.zeros(100).long()
    pgd, ls = (evaluate.evaluate_attack(model, images, labels, attack, 0.1)['correct'].mean()
               for attack in ('pgd20', 'ls'))
    assert pgd > 0.85 and ls == 0


def test_an_attack_that_leaves_the_ball_is_an_error(trained, monkeypatch):
    for wrong in (0.2, 0.05, -0.01, math.nan):
        monkeypatch.setattr(evaluate, 'pgd_attack', lambda model, x, *_, **__: x + wrong)
        with pytest.raises(RuntimeError, match='left the ball'):
            evaluate.evaluate_attack(trained, *digits(4), 'pgd20', 0.1)


@pytest.mark.parametrize('value, epsilon, step_size', [
    (1.5, 0.1, 0.01), (-0.1, 0.1, 0.01), (math.nan, 0.1, 0.01), (0.5, 8, 0.01), (0.5, 0.1, 2)])
def test_images_and_lengths_outside_0_to_1_are_refused(value, epsilon, step_size, trained):
    x = torch.full((2, 1, 28, 28), 0.5).index_fill(3, torch.tensor(5), value)
    told, y = r'must lie in \[0, 1\]', torch.zeros(2).long()
    refuses(told, evaluate.pgd_attack, trained, x, y, epsilon, step_size, 1)
    if step_size < 1:
        refuses(told, evaluate.run_attack, 'square', trained, x, y, epsilon)


def test_autoattack_matches_the_standard_version_of_the_package():
    torch.manual_seed(3)
    images = torch.randint(0, 256, (7, 1, 5, 5), dtype=torch.uint8)
    model, x = affine(torch.randn(10, 25), torch.randn(10)), data.to_float(images)
    labels = model(x).argmax(1)
    labels[:2] = (labels[:2] + 1) % 10  # the others are classified correctly
    outcomes = evaluate.evaluate_model(model, images, labels, ['autoattack'], 0.5, 0.06, 5, seed=5)
    correct = [outcome['correct'] for outcome in outcomes.values()]
    assert correct[0].sum() == 5 and 0 < correct[-1].sum() < 5
    official = pyautoattack.AutoAttack(model, eps=0.06, seed=5)
    _, y_adv = official.run_standard_evaluation(x, labels, batch_size=5)
    assert ((y_adv == labels).numpy() == correct[-1]).all()
    attacked = [np.isfinite(outcome['entropy']) for outcome in outcomes.values()]
    assert all((a == before).all() for before, a in zip(correct, attacked[1:]))


@pytest.mark.filterwarnings('ignore:there are .* zero gradient')
def test_apgd_t_targets_every_other_class():
    """Only the least likely class is within reach."""
    weight = torch.zeros(5, 25).index_fill(0, torch.tensor(4), 4.0)
    model = affine(weight, torch.tensor([0.0, -1, -2, -3, -4 - 100 * 127 / 255]))
    x, y = torch.full((3, 1, 5, 5), 127 / 255), torch.zeros(3).long()
    x_adv = evaluate.run_attack('apgd-t', model, x, y, 0.1)
    assert (model(x).argmax(1) == 0).all() and (model(x_adv).argmax(1) == 4).all()


# ---------------------------------------------------------------- metrics
def test_measures_and_entropy_report_against_numpy(trained):
    images, labels = digits(40)
    outcome = evaluate.evaluate_attack(trained, images, labels, 'pgd20', 0.03)
    x = data.to_float(images, torch.channels_last)
    z = trained(evaluate.run_attack('pgd20', trained, x, labels, 0.03)).detach().double().numpy()
    p, y = np.exp(z) / np.exp(z).sum(1, keepdims=True), labels.numpy()[:, None]
    h, p_y = -(p * np.log(p)).sum(1), np.take_along_axis(p, y, 1)[:, 0]
    right = z.argmax(1) == y[:, 0]
    np.put_along_axis(p, y, -1, 1)
    for name, expected in dict(entropy=h, margin=p_y - p.max(1), p_wrong=1 - p_y).items():
        np.testing.assert_allclose(outcome[name], expected, atol=1e-5)
    assert (outcome['correct'] == right).all() and 0 < right.mean() < 1
    assert (outcome['kappa'][right] >= 10).all() and outcome['kappa'].max() <= 20
    t = float(np.median(h))
    assert evaluate.entropy_report(outcome['entropy'], right, t) == pytest.approx({
        'entropy': h.mean(), 'sd_of_w': (h / h.mean()).std(), 'high_entropy': (h > t).mean(),
        'accuracy_high_entropy': right[h > t].mean(),
        'accuracy_low_entropy': right[h <= t].mean()}, abs=1e-5)


def test_entropy_is_finite_where_probabilities_are_zero():
    logits = torch.tensor([[0.0, -1e5, -1e5], [0.0, 0.0, -math.inf], [1.0, 1.0, 1.0]])
    expected = torch.tensor([0.0, 2.0, 3.0]).clamp(min=1).log()
    torch.testing.assert_close(evaluate.entropy(logits), expected)


def test_a_network_in_train_mode_is_evaluated_in_eval_mode_and_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5),
                          nn.Linear(256, 10))
    expected = evaluate.evaluate_attack(model.eval(), *digits(32), 'pgd10', 0.02)['entropy']
    model.train()
    model[1].eval()  # frozen batch statistics
    model[0].weight.requires_grad_(False)
    before, state = comparable(model.state_dict()), torch.manual_seed(123).get_state()
    again = evaluate.evaluate_attack(model, *digits(32), 'pgd10', 0.02)['entropy']
    assert (again == expected).all()
    assert [m.training for m in model] == [True, False, True, True, True] and model.training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert comparable(model.state_dict()) == before and torch.get_rng_state().equal(state)


def test_attacks_search_at_torchs_precision_and_verdicts_are_in_float32(trained):
    def precision():
        conv = torch.backends.cudnn
        return conv.conv.fp32_precision if hasattr(conv, 'conv') else conv.allow_tf32
    seen, default = [], precision()
    with trained.register_forward_pre_hook(lambda *_: seen.append(precision())):
        evaluate.evaluate_attack(trained, *digits(4), 'pgd10', 0.1)
    assert seen == [default] * 10 + [seen[-1]] and precision() == default
    assert seen[-1] in ('ieee', False) and default not in ('ieee', False)
    expected = evaluate.evaluate_attack(trained, *digits(32), 'clean', 0)['entropy']
    with torch.autocast('cpu', torch.bfloat16):
        half = evaluate.evaluate_attack(trained, *digits(32), 'clean', 0)['entropy']
    assert (half == expected).all()
    assert evaluate.predict(lambda x: x.bfloat16(), digits(8)[0]).dtype == torch.float32


def test_a_second_call_runs_only_the_missing_batches(trained):
    attack = functools.partial(evaluate.evaluate_attack, trained, *digits(10), 'pgd10', 0.1,
                               batch_size=4, file='kept.npy')
    expected, measures, passes = attack(), np.load('kept.npy'), []
    measures[:, 4:8] = np.nan
    np.save('kept.npy', measures)
    with trained.register_forward_hook(lambda *_: passes.append(1)):
        again = attack()
    assert len(passes) == 10 + 1 and all((again[k] == expected[k]).all() for k in again)


# ---------------------------------------------------------------- the command
FAST = '--attacks pgd20 ls --n-examples 40 --batch-size 5 --epsilon 0.06 --model-path'


def test_the_table_the_json_and_the_outcomes_agree_with_the_functions(run, trained):
    out, _ = command('--json a.json --save-outcomes a.npz --entropy-threshold 9', FAST, run)
    outcomes = evaluate.evaluate_model(trained, *digits(40), ('pgd20', 'ls'), 0.06, batch_size=5)
    correct = {k: outcome['correct'] for k, outcome in outcomes.items()}
    worst = correct['pgd20'] & correct['ls']
    assert worst.sum() < max(correct['pgd20'].sum(), correct['ls'].sum())
    expected = {k: v.mean() for k, v in correct.items()} | {
        'worst': worst.mean(), 'pgd20 - worst': (correct['pgd20'] & ~worst).mean()}
    row = {k: f'{100 * v:.2f}' for k, v in expected.items()}
    assert table(out) == {'digits-at-seed1': row} and 'n = 40' in out and 'epsilon 0.06;' in out
    assert table(out, 1)['digits-at-seed1']['accuracy high entropy'] == '-'  # of no example
    content = json.loads(Path('a.json').read_text())
    model, clean = content['models'][0], expected['clean']
    assert model['accuracy'] == pytest.approx(expected) and model['warnings'] == []
    assert model['stderr']['clean'] == pytest.approx((clean * (1 - clean) / 40) ** 0.5)
    assert model['report']['entropy'] == pytest.approx(outcomes['pgd20']['entropy'].mean())
    assert model['report']['accuracy_high_entropy'] is None
    assert content['versions']['torch'] == torch.__version__ and content['args']['seed'] == 1
    saved = np.load('a.npz')
    assert list(saved['columns']) == list(correct) and (saved['labels'] == digits(40)[1]).all()
    for name in evaluate.MEASURES:
        values = np.array([[outcome[name] for outcome in outcomes.values()]])
        kind = bool if name == 'correct' else np.float16
        np.testing.assert_array_equal(saved[name], values.astype(kind), strict=True)


def test_seeds_are_averaged_and_figures_are_written_as_png_and_pdf(run, trained):
    others = [make_run('digits-at-seed2', trained, 0.3), make_run('$x_seed1', trained),
              make_run('digits-ew-at-seed1', trained, 0.5)]
    out, _ = command('--attacks fgsm autoattack --n-examples 12 --epsilon 0.3 --json a.json '
                     '--figures f --model-path', run, *others)
    rows = {name: row['entropy'] for name, row in table(out, 1).items()}
    entropies = [float(rows[f'digits-at-seed{n}']) for n in (1, 2)]
    found = [float(v) for v in rows['digits-at (2 seeds): mean ± sd'].split(' ± ')]
    assert found == pytest.approx([np.mean(entropies), np.std(entropies, ddof=1)], abs=2e-3)
    seeds, = json.loads(Path('a.json').read_text())['seeds']
    assert len(table(out)) == 5 and seeds['models'] == ['digits-at-seed1', 'digits-at-seed2']
    assert seeds['report']['sd']['entropy'] == pytest.approx(found[1], abs=2e-3) and found[1] > 0.1
    names = 'entropy_histogram', 'entropy_vs_robustness', 'pgd_vs_worst', 'tsne'
    assert {*os.listdir('f')} == {f'{name}.{kind}' for name in names for kind in ('png', 'pdf')}
    assert all(Path('f', name).stat().st_size > 8000 for name in os.listdir('f'))


def test_saved_results_are_reused_unless_a_setting_the_images_or_the_network_change():
    def count(*more):
        """The number of passes through the network."""
        sys.modules.pop('helper', None)
        seen.append(command(args, 'pgd20 ls apgd-ce --batch-size 4', *more)[0])
        return len(sys.modules['helper'].calls)
    args, seen = linear_network(), []
    first, again = count(), count()
    assert seen[0] == seen[1] and again < 20 < 100 < first
    assert count('--entropy-threshold 1') == again
    for other in ('--seed 2', '--batch-size 6', '--epsilon 0.06', '--n-examples 10',
                  '--split train', '--aa-epsilon 0.07'):
        assert count(other) > again + 10 and count(other) == again, other
    linear_network('logits.detach() + 0 * logits')  # by what it imports: no gradient, same logits
    assert count() > again + 10 and seen[-1] != seen[0]
    weights = torch.load('own.pt', weights_only=True)
    weights['weight'][0, 0] += 1e-4
    torch.save(weights, 'own.pt')
    assert count() > again + 10
    own_images(test_labels=np.append(np.arange(19) % 5, 0))
    assert count() > again + 10


def test_a_killed_evaluation_continues_and_gives_the_same_outcomes_as_two_processes(run, trained):
    args = '--attacks pgd20 pgd100 apgd-ce --n-examples 12 --batch-size 5 --epsilon 0.04 --no-cuda'
    other = make_run('other/digits-at-seed1', trained)
    program = [ROOT / 'evaluate.py', *args.split(), '--model-path']
    killed = subprocess.Popen([sys.executable, *program, run], env=ENV, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    for line in killed.stderr:
        if ': pgd20' in line:
            killed.kill()
    assert killed.communicate()[0] == '' and killed.returncode == -signal.SIGKILL
    assert {name.split('-')[0] for name in os.listdir(f'{run}/best.pt.eval')} == {'clean', 'pgd20'}
    paths = f'--model-path {run} {run}/best.pt.eval'  # as with {run}/*
    out, _ = command(args, '--save-outcomes one.npz', paths)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2',
                           '--standalone', *program, other, '--save-outcomes', 'two.npz'], env=ENV,
                          text=True, timeout=300, capture_output=True)
    assert done.returncode == 0 and done.stdout == out, done.stderr
    assert done.stderr.count(': pgd20') == 1
    one, two = np.load('one.npz'), np.load('two.npz')
    assert all(np.array_equal(one[k], two[k], equal_nan=one[k].dtype.kind == 'f') for k in one)


def test_the_table_is_printed_before_a_full_disk_ends_the_command(run, monkeypatch):
    full_disk(monkeypatch, lambda *_: True)
    out, err = command('--json a.json', FAST, run, status=2)
    assert table(out) and err.count(f'cannot write {run}/best.pt.eval/') == 3  # clean, pgd20, ls
    assert re.search('^evaluate.py: error: .*No space left', err, re.M)


@pytest.mark.parametrize('change, before, told', [
    ('torch.softmax(1e4 * logits, 1)', 'x', 'probability distribution'),
    ('logits', 'torch.round(8 * x) / 8', 'zero gradient'),
    ('logits', 'x + (x - x.clamp(0, 1)).pow(2).sqrt()', 'zero gradient'),  # or one that is NaN
    ('logits + 0.1 * torch.rand_like(logits)', 'x', 'randomized')])
def test_attacks_that_cannot_work_give_one_warning_line(change, before, told):
    _, err = command(linear_network(change, before), 'pgd20 ls --json a.json')
    assert len(re.findall(f'^Warning: .*{told}.*$', err, re.M)) == 1
    assert told in str(json.loads(Path('a.json').read_text())['models'][0]['warnings'])


def test_a_network_that_cannot_take_a_single_image_is_refused():
    assert '(1, 5)' in refused('evaluate', linear_network('logits.squeeze(0)'), 'clean')


def test_low_clean_accuracy_of_a_foreign_checkpoint_gives_a_hint(trained):
    good = trained.state_dict()
    bad = good | {'classifier.fc3.bias': good['classifier.fc3.bias'] + 9 * torch.eye(10)[1]}
    ours = dict(state_dict=bad, algorithm='at', dataset='digits', args={})
    for content in (good, bad, ours):
        torch.save(content, 'a.pt')
        _, err = command('--dataset digits --attacks clean --n-examples 100 --model-path a.pt')
        assert ('--normalize' in err and 'preactresnet18-raw' in err) == (content is bad), err


def test_apgd_t_is_refused_with_fewer_than_four_classes():
    own_images(train_labels=np.arange(52) % 3, test_labels=np.arange(20) % 3)
    args = linear_network(num_classes=3)
    for attack in ('autoattack', 'apgd-t'):
        assert 'at least 4 classes' in refused('evaluate', args, attack)
    assert table(command(args, 'apgd-ce fab-t')[0])


@pytest.mark.parametrize('flags, told', [
    ('--model-path nothing.pt', 'nothing.pt'), ('--model-path text.pt', 'text.pt'),
    ('--model-path bare.pt', '--dataset'), ('--model-path .', './best.pt'), ('--seed -1', '--seed'),
    ('--model-path a.eval', '--names'), ('--attacks pgd7', "'pgd7'"), ('--names a b', '--names'),
    ('--epsilon 8', '8/255'), ('--n-examples 361', '360'), ('--normalize 0.5', 'mean_and_std'),
    *[(f'--normalize {wrong}', 'normalized by') for wrong in ('0.5/0', '0.5/nan', '1,2/1')],
    ('--batch-size 0', '--batch-size'), ('--dataset imagenet --epsilon 0.1', 'imagenet'),
    ('--figures text.pt/x', 'text.pt'),
    ('--model-path own.pt --arch net.py:linear --dataset digits', 'not take images (1, 28, 28)'),
    ('--model-path own.pt --arch net.py:Gone --dataset own.npz', 'Gone')])
def test_an_invalid_flag_gives_one_line_and_exit_status_2(flags, told, trained):
    linear_network(num_classes=10)
    torch.save(dict(state_dict=trained.state_dict(), algorithm='at', dataset='digits', args={}),
                'ours.pt')
    torch.save(trained.state_dict(), 'bare.pt')
    Path('text.pt').write_text('not a model\n')
    assert told in refused('evaluate', '--model-path ours.pt', flags)


# ---------------------------------------------------------------- the pages and their commands
RESULTS = ROOT / 'results'
PAGES = ROOT / 'README.md', RESULTS / 'README.md', RESULTS / 'cifar10' / 'README.md'


def commands_of(text):
    """[[script, *args]] of the commands in the bash blocks of a page, with loops unrolled."""
    show = 'python() { printf "%s|" "$@"; echo; }; torchrun() { python "${@:2}"; }\n'
    blocks = '\n'.join(re.findall(r'```bash\n(.*?)```', text, re.S))
    done = subprocess.run(['/bin/bash', '-c', show + blocks], text=True, capture_output=True,
                          env={'PATH': ''})  # runs nothing else
    lines = [line.split('|')[:-1] for line in done.stdout.splitlines()]
    return [line for line in lines if line[0].endswith('.py')]


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_links_and_figures_exist(page):
    links = re.findall(r'(?:\]\(|src=")((?!http)[^)"#]*)(#[^)]*)?[)"]', page.read_text())
    for link, anchor in links:
        target = page.parent / link if link else page
        assert target.exists(), link
        headings = re.findall('^#+ (.*)', target.read_text(), re.M) if anchor else []
        names = ['#' + re.sub(r'[^\w -]', '', h.lower()).replace(' ', '-') for h in headings]
        assert not anchor or anchor in names


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_every_command_of_the_pages_parses(page):
    commands = commands_of(page.read_text())
    for script, *args in commands:
        if not script.startswith('results/') and '--resume' not in args:
            importlib.import_module(script[:-3]).parse_args(args)
    assert len(commands) > 10


def test_each_recipe_has_its_own_directory_and_is_evaluated():
    recipes, evaluated = PAGES[0].read_text().split('## Recipes')[1], set()
    made = [importlib.import_module(script[:-3]).parse_args(args)[1].model_dir
            for script, *args in commands_of(recipes) if script != 'evaluate.py']
    for directory in made:
        os.makedirs(directory)
        for name in ('best.pt', 'last.pt'):
            Path(directory, name).touch()
    for script, *args in commands_of(recipes):  # whose patterns match now
        paths = evaluate.parse_args(args)[1].model_path if script == 'evaluate.py' else []
        assert all(map(os.path.exists, paths)), paths
        evaluated |= set(map(os.path.dirname, paths))
    assert len(made) > 25 and evaluated == set(made)


def test_the_python_example_in_the_readme_runs():
    lines, = re.findall(r'```python\n(import data, evaluate.*?)```', PAGES[0].read_text(), re.S)
    lines = lines.replace("'cifar10'", "'digits'").replace('size=1000', 'size=4')
    with redirect_stdout(io.StringIO()) as out:
        exec(lines, {'model': nn.Sequential(nn.Flatten(), nn.Linear(784, 10))})
    assert all(f"'{column}': " in out.getvalue() for column in ('clean', 'ls', 'autoattack'))


def test_the_recipe_in_data_py_turns_folders_of_images_into_a_data_set():
    for i, folder in enumerate(('train/cat', 'train/dog', 'test/cat', 'test/dog')):
        os.makedirs(folder)
        for name in range(20):
            Image.new('RGB', (40, 50), (50 * i, 9, 200)).save(f'{folder}/{name}.png')
    lines = re.search(r'    import numpy.*', data.__doc__, re.S)[0]
    exec(re.sub('^    ', '', lines, flags=re.M), {})
    images, labels = data.load_data('my_data.npz', size=39)  # refused if sorted by class
    assert images.shape == (39, 3, 32, 32) and set(labels.tolist()) == {0, 1}
    assert (images[:, :2, 0, 0] == torch.stack([50 * labels, 0 * labels + 9], 1)).all()


def test_rsts_images_are_read_without_running_code():
    page = PAGES[1].read_text()
    snippet, = re.findall(r'```python\n(import pickle.*?)```', page, re.S)
    images = np.random.randint(256, size=(20, 32, 32, 3), dtype=np.uint8)
    content, file = {'data': images, 'extrapolated_targets': np.arange(20) % 10}, Path(
        'ti_500K_pseudo_labeled.pickle')
    for protocol in range(2, 6):
        file.write_bytes(pickle.dumps(content, protocol))
        exec(snippet, {})
        found, labels = data.load_npz('ti_500k.npz', 'image', 'label')
        assert (found.permute(0, 2, 3, 1).numpy() == images).all()
        assert labels.tolist() == [*range(10)] * 2
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match='exec'):
        exec(snippet, {})
    assert not Path('ran').exists()


@pytest.mark.parametrize('name', ['outcomes-seed1', 'outcomes-seed2', 'first-1000'])
def test_the_committed_networks_are_the_evaluated_ones(name):
    for row in json.loads((RESULTS / 'cifar10' / f'{name}.json').read_text())['models']:
        sha = hashlib.sha256(b'WideResNet')
        model = models.load_model(ROOT / row['path'], num_classes=10)
        for key, tensor in sorted(model.state_dict().items()):
            sha.update(f'{key} {tensor.dtype} {tuple(tensor.shape)}'.encode())
            sha.update(tensor.numpy().tobytes())
        assert sha.hexdigest() == row['weights'], row['path']


def test_the_analysis_of_the_results_runs():
    done = subprocess.run([sys.executable, RESULTS / 'analysis.py', '--no-figures'],
                          capture_output=True, text=True)
    assert done.returncode == 0 and '| cifar10 | TRADES | control |' in done.stdout, done.stderr
