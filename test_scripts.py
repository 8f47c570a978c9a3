"""The commands, end to end: python -m pytest -q test_scripts.py"""

import argparse
import copy
import csv
import importlib
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import models

torch.set_num_threads(1)  # small work: more threads only get in each other's way

ROOT = Path(__file__).parent
ALGORITHMS = ('at', 'trades', 'mart', 'gairat')
TINY = ('--dataset digits --train-size 104 --test-size 40 --epochs 2 --num-steps 2 --batch-size 32 '
        '--no-cuda').split()
THREADS = {'OMP_NUM_THREADS': '1'}


def run(script, *args, cwd, **env):
    """A command as a user types it: its exit status, stdout and stderr."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)],
        cwd=cwd,
        text=True,
        timeout=300,
        env=os.environ | THREADS | env,
        capture_output=True,
    )


def rows_of(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The eight methods, trained on a few digits; {name: directory}."""
    root, found = tmp_path_factory.mktemp('runs'), {}

    def train(name):
        script = f'train_{name.split("-")[-1]}.py'
        return run(script, *TINY, *['--entropy-weight'] * name.startswith('ew-'), cwd=root)

    names = [prefix + algorithm for algorithm in ALGORITHMS for prefix in ('', 'ew-')]
    with ThreadPoolExecutor(2) as pool:
        for name, done in zip(names, pool.map(train, names)):
            assert done.returncode == 0, done.stderr
            assert done.stderr == ''
            line = r'^epoch \d/2 .*clean .*pgd10 .*entropy .*images/s .*min left$'
            assert len(re.findall(line, done.stdout, re.M)) == 2
            found[f'digits-{name}-seed1'] = root / 'runs' / f'digits-{name}-seed1'
    return found


def test_each_method_leaves_its_log_configuration_and_weights(runs):
    assert len(runs) == 8
    weights = {}
    for name, directory in runs.items():
        assert sorted(p.name for p in directory.iterdir()) == [
            '.lock',
            'best.pt',
            'config.json',
            'last.pt',
            'log.csv',
        ]
        rows = rows_of(directory / 'log.csv')
        assert list(rows[0]) == [
            'epoch',
            'lr',
            'loss',
            'clean',
            'pgd10',
            'entropy',
            'high_entropy',
            'images_per_s',
            'seconds',
        ]
        assert [row['epoch'] for row in rows] == ['1', '2']
        for row in rows:
            assert (
                0 <= float(row['pgd10']) <= 1
                and 0 < float(row['entropy']) < 2.31
                and float(row['loss']) > 0
            )
        config = json.loads((directory / 'config.json').read_text())
        assert (
            config['args']['epsilon'] == 0.1
            and config['args']['lr'] == 0.02
            and 'torch' in config['versions']
        )
        content = models.read_checkpoint(directory / 'best.pt')
        assert (
            content['algorithm'] in name
            and content['dataset'] == 'digits'
            and content['arch'] == 'smallcnn'
        )
        assert max(content['log'], key=lambda row: row['pgd10']) == content['log'][-1]
        model = models.load_model(directory / 'last.pt', num_classes=10)
        weights[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert not model.training and weights[name].isfinite().all()
    # Another loss gives other weights
    assert len({tuple(w[-2000:].tolist()) for w in weights.values()}) == 8


def test_the_log_is_what_the_weights_do(runs):
    directory = runs['digits-ew-trades-seed1']
    model = models.load_model(directory / 'last.pt')
    images, labels = evaluate.load_data('digits', train=False, size=40)
    again = evaluate.evaluate_epoch(model, images, labels, 0.1, 512, seed=1)
    row = rows_of(directory / 'log.csv')[-1]
    assert {k: float(row[k]) for k in again} == pytest.approx(again, abs=1e-6)


def test_each_list_of_numbers_seeds_draws_of_its_own():
    lists = [(1,), (1, 0), (1, 0, 0), (1, 0, 0, 1), (0,), (0, 1), (1, 1), (1, 1, 0), (2,)]
    draws = []
    for numbers in lists * 2:
        evaluate.seed_everything(*numbers)
        draws.append(torch.rand(()).item())
    assert draws[:len(lists)] == draws[len(lists):] and len(set(draws)) == len(lists)


def test_the_same_command_twice_gives_the_same_weights_and_another_seed_others(tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        assert (
            run('train_at.py', *TINY, '--seed', seed, '--model-dir', name, cwd=tmp_path).returncode
            == 0
        )
    a, b, c = (models.read_checkpoint(tmp_path / name / 'last.pt')['state_dict'] for name in 'abc')
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


def test_save_freq_keeps_epochs(tmp_path):
    assert (
        run('train_at.py', *TINY, '--save-freq', 2, '--model-dir', 'r', cwd=tmp_path).returncode
        == 0
    )
    assert models.read_checkpoint(tmp_path / 'r' / 'epoch-2.pt')['epoch'] == 2
    assert not (tmp_path / 'r' / 'epoch-1.pt').exists()


# ---------------------------------------------------------------- bad input


def fails(script, args, capsys, monkeypatch):
    """Run a script's main() in this process; it must end with status 2 and one line: that."""
    monkeypatch.setattr(sys, 'argv', [f'{script}.py', *map(str, args)])
    with pytest.raises(SystemExit) as error:
        importlib.import_module(script).main()
    told = capsys.readouterr()
    assert error.value.code == 2 and told.err.count('\n') == 1 and told.err.endswith('\n'), told.err
    assert 'Traceback' not in told.err and told.err.startswith(f'{script}.py: error: ')
    return told.err


BAD = [
    (['--dataset', 'svhn'], 'svhn'),
    (['--arch', 'vgg'], 'vgg'),
    (['--arch', 'wideresnet29-10'], 'wideresnet29-10'),
    (['--dataset', 'cifar10', '--arch', 'smallcnn'], '28 x 28'),
    (['--unknown'], '--unknown'),
    (['--lr-milestones', '5', '3'], 'rise'),
    (['--lr-milestones', '5', '5'], 'rise'),
    (['--lr-milestones', '-1'], '-1'),
    (['--train-size', '1438'], '1437'),
    (['--test-size', '361'], '360'),
    (['--epsilon', '8'], '8/255'),
    (['--epsilon', '8/0'], '8/0'),
    (['--lr', 'inf'], 'inf'),
    (['--wd', '-1'], '-1'),
    (['--entropy', '-w'], '--entropy'),
    (['--seed', '-1'], '-1'),
    (['--momentum', 'x'], 'x'),
]
BAD += [
    ([flag, value], flag)
    for flag in (
        '--epsilon',
        '--step-size',
        '--lr',
        '--tau',
        '--batch-size',
        '--epochs',
        '--num-steps',
        '--log-interval',
        '--test-batch-size',
    )
    for value in ('0', '-1', 'nan', 'many')
]


@pytest.mark.parametrize(
    'args, told', BAD, ids=lambda v: ' '.join(v) if isinstance(v, list) else ''
)
def test_bad_input_is_one_line_and_nothing_written(args, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = [] if '--dataset' in args else ['--dataset', 'digits']
    assert told in fails('train_at', dataset + args, capsys, monkeypatch)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'script, args',
    [
        ('train_trades', ['--beta', '-1']),
        ('train_mart', ['--beta', 'nan']),
        ('train_gairat', ['--psi', 'nan']),
        ('train_gairat', ['--begin-epoch', '21']),
        ('train_gairat', ['--begin-epoch', '0']),
    ],
)
def test_bad_input_of_one_algorithm(script, args, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(script, ['--dataset', 'digits', *args], capsys, monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_overwritten(runs, capsys, monkeypatch):
    directory = runs['digits-at-seed1']
    before = (directory / 'last.pt').read_bytes()
    assert 'already holds a run' in fails(
        'train_at', [*TINY, '--model-dir', directory], capsys, monkeypatch
    )
    monkeypatch.chdir(directory.parent.parent)
    assert 'already holds a run' in fails(
        'train_at', TINY, capsys, monkeypatch
    )  # by its default name
    assert (directory / 'last.pt').read_bytes() == before


def test_directories_that_cannot_be(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('')
    assert 'file' in fails('train_at', [*TINY, '--model-dir', 'file/run'], capsys, monkeypatch)
    told = fails('train_at', ['--dataset', 'mnist', '--data-dir', 'file'], capsys, monkeypatch)
    assert 'mnist' in told and 'file' in told and '--dataset digits' in told


def test_a_data_set_that_is_nowhere(tmp_path, capsys, monkeypatch):
    from torchvision import datasets

    def download(self):
        raise RuntimeError('Error downloading cifar-10-python.tar.gz')

    monkeypatch.setattr(datasets.CIFAR10, 'download', download)
    told = fails('train_at', ['--data-dir', tmp_path / 'there'], capsys, monkeypatch)
    assert 'cifar10' in told and str(tmp_path / 'there') in told and '--dataset digits' in told


def test_no_visible_device_means_the_cpu_and_says_so(tmp_path):
    done = run('train_at.py', *TINY[:-1], '--epochs', 1, cwd=tmp_path, CUDA_VISIBLE_DEVICES='')
    assert done.returncode == 0 and 'CPU' in done.stdout
    assert "CUDA_VISIBLE_DEVICES=''" in done.stderr and done.stderr.count('\n') == 1


# ---------------------------------------------------------------- defaults and documentation


@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_defaults_are_the_protocol_of_the_paper(algorithm):
    parse_args = importlib.import_module(f'train_{algorithm}').parse_args
    args, _ = parse_args([])
    assert (args.dataset, args.arch, args.epochs, args.lr, args.lr_milestones) == (
        'cifar10',
        'preactresnet18',
        110,
        0.1,
        [100, 105],
    )
    assert (args.epsilon, args.step_size, args.num_steps) == (8 / 255, 2 / 255, 10)
    assert (args.batch_size, args.momentum, args.weight_decay, args.tau) == (128, 0.9, 5e-4, 1)
    args, _ = parse_args(['--dataset', 'mnist'])
    assert (args.arch, args.epochs, args.lr, args.lr_milestones) == (
        'smallcnn',
        100,
        0.01,
        [20, 40],
    )
    assert (args.epsilon, args.step_size, args.num_steps, args.weight_decay) == (
        0.3,
        0.01,
        40,
        1e-4,
    )
    args, _ = parse_args(['--epochs', '11', '--epsilon', '0.031', '--tau', 'inf', '--wd', '2e-4'])
    assert (args.lr_milestones, args.epsilon, args.tau, args.weight_decay) == (
        [10, 11],
        0.031,
        float('inf'),
        2e-4,
    )
    options = {
        'at': {},
        'trades': {'beta': 6.0},
        'mart': {'beta': 6.0},
        'gairat': {'psi': -1.0, 'begin_epoch': 5},
    }
    assert options[algorithm].items() <= vars(args).items()


@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_help_explains_every_flag(algorithm, capsys):
    module = importlib.import_module(f'train_{algorithm}')
    with pytest.raises(SystemExit) as done:
        module.parse_args(['--help'])
    told = capsys.readouterr().out
    assert (
        done.value.code == 0
        and '--entropy-weight' in told
        and 'preactresnet18' in told
        and 'lr_milestones' in told
    )


def test_gairat_weights_begin_at_their_epoch():
    import train_gairat

    args, _ = train_gairat.parse_args(['--epochs', '10'])
    assert [train_gairat.loss_options(args, e)['psi'] for e in (1, 4, 5, 10)] == [
        float('inf')
    ] * 2 + [-1.0] * 2


# ---------------------------------------------------------------- interrupted and resumed

TIMING = ('images_per_s', 'seconds')


def same_run(a, b):
    """Two runs ended alike: weights, momentum and log to the bit, all but the clock."""
    a, b = (models.read_checkpoint(d / 'last.pt') for d in (a, b))
    assert a['epoch'] == b['epoch'] and a['step'] == b['step'] == 0
    assert all(torch.equal(a['state_dict'][k], b['state_dict'][k]) for k in a['state_dict'])
    momenta = [[s['momentum_buffer'] for s in c['optimizer']['state'].values()] for c in (a, b)]
    assert all(map(torch.equal, *momenta))
    logs = [[{k: v for k, v in row.items() if k not in TIMING} for row in c['log']] for c in (a, b)]
    assert logs[0] == logs[1]


def start_and_signal(script, args, directory, number):
    """Start a run that saves after each step, and send it the signal in the middle of epoch 2."""
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / script),
            *args,
            '--model-dir',
            str(directory),
            '--save-every-minutes',
            '0.0001',
        ],
        env=os.environ | THREADS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        last = directory / 'last.pt'
        if last.exists() and (at := models.read_checkpoint(last))['epoch'] == 1 and at['step'] >= 1:
            process.send_signal(number)
            break
        time.sleep(0.002)
    out, err = process.communicate(timeout=60)
    return process.returncode, err


EXTRAS = '--ema 0.8 --awp-gamma 0.01 --awp-warmup 1 --lr-schedule cosine'.split()
INTERRUPTED = {a: (f'train_{a}.py', ['--entropy-weight'], signal.SIGKILL) for a in ALGORITHMS} | {
    'SIGINT': ('train_at.py', [], signal.SIGINT),
    'SIGTERM': ('train_at.py', [], signal.SIGTERM),
    'extras': ('train_trades.py', EXTRAS, signal.SIGKILL),
}


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    """Runs signalled inside epoch 2 and then resumed: {name: (directory, status, stderr, step)}."""
    root = tmp_path_factory.mktemp('interrupted')

    def interrupt(name):
        script, flags, number = INTERRUPTED[name]
        directory = root / name
        status, told = start_and_signal(script, [*TINY, *flags], directory, number)
        step = models.read_checkpoint(directory / 'last.pt')['step']
        with open(directory / 'log.csv', 'a') as log:
            log.write('2,0.02,1.2')  # a line cut off
        done = run(script, '--resume', directory, '--log-interval', 3, cwd=root)
        assert done.returncode == 0, done.stderr
        return directory, status, told, step

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(INTERRUPTED, pool.map(interrupt, INTERRUPTED)))


@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_killed_inside_an_epoch_and_resumed_is_as_if_nothing_had_been(algorithm, runs, interrupted):
    directory, status, _, step = interrupted[algorithm]
    assert status == -signal.SIGKILL and 0 < step < 4
    uninterrupted = runs[f'digits-ew-{algorithm}-seed1']
    same_run(directory, uninterrupted)
    ours, theirs = rows_of(directory / 'log.csv'), rows_of(uninterrupted / 'log.csv')
    assert [{k: row[k] for k in row if k not in TIMING} for row in ours] == [
        {k: row[k] for k in row if k not in TIMING} for row in theirs
    ]
    best = [models.read_checkpoint(d / 'best.pt')['epoch'] for d in (directory, uninterrupted)]
    assert best[0] == best[1]


@pytest.mark.parametrize('name, status', [('SIGINT', 130), ('SIGTERM', 143)])
def test_a_signal_saves_says_how_to_go_on_and_leaves(name, status, runs, interrupted):
    directory, got, told, step = interrupted[name]
    assert got == status and f'--resume {directory}' in told and told.count('\n') == 1 and step > 0
    same_run(directory, runs['digits-at-seed1'])


def test_averaged_weights_and_weight_perturbation_survive_as_well(interrupted, tmp_path):
    done = run('train_trades.py', *TINY, *EXTRAS, '--model-dir', 'whole', cwd=tmp_path)
    assert done.returncode == 0
    same_run(tmp_path / 'whole', interrupted['extras'][0])
    whole = tmp_path / 'whole'
    a, b = (models.read_checkpoint(d / 'last.pt') for d in (whole, interrupted['extras'][0]))
    assert all(
        torch.equal(a['ema_state_dict'][k], b['ema_state_dict'][k]) for k in a['ema_state_dict']
    )
    assert not torch.equal(
        a['ema_state_dict']['classifier.fc3.weight'],
        a['state_dict']['classifier.fc3.weight'],
    )
    assert 'ema_pgd10' in a['log'][-1] and models.best_row(a['log'])['ema_pgd10'] == max(
        row['ema_pgd10'] for row in a['log']
    )
    loaded = models.load_model(
        tmp_path / 'whole' / 'last.pt'
    ).state_dict()  # the average is what counts
    assert torch.equal(
        loaded['classifier.fc3.weight'], a['ema_state_dict']['classifier.fc3.weight']
    )


def test_more_epochs_go_on_from_the_last(runs, tmp_path):
    shutil.copytree(runs['digits-at-seed1'], tmp_path / 'run')
    assert run('train_at.py', '--resume', 'run', '--epochs', 3, cwd=tmp_path).returncode == 0
    assert [row['epoch'] for row in rows_of(tmp_path / 'run' / 'log.csv')] == ['1', '2', '3']


@pytest.mark.parametrize(
    'args, told',
    [
        (['--lr', '0.5'], '--lr 0.5'),
        (['--epochs', '1'], '--epochs 1'),
        (['--entropy-weight'], '--entropy-weight'),
        (['--dataset', 'mnist'], '--dataset mnist'),
        (['--seed', '2'], '--seed 2'),
    ],
)
def test_a_resumed_run_keeps_its_arguments(args, told, runs, capsys, monkeypatch):
    assert told in fails(
        'train_at', ['--resume', runs['digits-at-seed1'], *args], capsys, monkeypatch
    )


def test_what_cannot_be_resumed_is_refused_by_name(runs, tmp_path, capsys, monkeypatch):
    class Malicious:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path / "ran"}',)

    assert 'train_mart.py' in fails(
        'train_at', ['--resume', runs['digits-mart-seed1']], capsys, monkeypatch
    )
    assert 'no such file' in fails('train_at', ['--resume', tmp_path], capsys, monkeypatch)
    good = (runs['digits-at-seed1'] / 'last.pt').read_bytes()
    for content in (good[:-1000], good[:5000], b'', b'text', pickle.dumps(Malicious())):
        (tmp_path / 'last.pt').write_bytes(content)
        assert str(tmp_path / 'last.pt') in fails(
            'train_at', ['--resume', tmp_path], capsys, monkeypatch
        )
    for content in (Malicious(), {'state_dict': {}}, [1]):
        torch.save(content, tmp_path / 'last.pt')
        assert str(tmp_path / 'last.pt') in fails(
            'train_at', ['--resume', tmp_path], capsys, monkeypatch
        )
    assert not (tmp_path / 'ran').exists()


# ---------------------------------------------------------------- bad days


def main_of(script, args, monkeypatch):
    """Run a script's main() in this process; its exit status."""
    monkeypatch.setattr(sys, 'argv', [f'{script}.py', *map(str, args)])
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        importlib.import_module(script).main()
    except SystemExit as error:
        return error.code
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    return 0


def test_a_loss_that_is_not_finite_stops_the_run_there(tmp_path, capsys, monkeypatch):
    import train_at

    steps = []

    def example_losses(model, x, adv, y, **options):
        steps.append(len(y))
        losses = torch.nn.functional.cross_entropy(model(adv), y, reduction='none')
        return losses * (float('nan') if len(steps) == 6 else 1), 0

    monkeypatch.setattr(train_at, 'example_losses', example_losses)
    args = [*TINY, '--model-dir', tmp_path, '--log-interval', 1]
    assert main_of('train_at', args, monkeypatch) == 3
    told = capsys.readouterr().err
    assert (
        'epoch 2, step 2' in told
        and 'learning rate' in told
        and told.count('\n') == 1
        and len(steps) == 6
    )
    last = models.read_checkpoint(tmp_path / 'last.pt')
    assert last['epoch'] == 1 and all(v.isfinite().all() for v in last['state_dict'].values())


def test_a_run_that_stays_at_chance_is_stopped(tmp_path, capsys, monkeypatch):
    args = [*TINY, '--lr', '1e-9', '--epochs', '8', '--model-dir', tmp_path]
    assert main_of('train_at', args, monkeypatch) == 3
    assert 'chance' in capsys.readouterr().err and len(rows_of(tmp_path / 'log.csv')) == 5


def test_a_full_disk_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    save, attempts = models.save_checkpoint, []

    def full_at_first(content, path):
        attempts.append(path)
        if len(attempts) == 1:
            raise OSError(28, 'No space left on device')
        save(content, path)

    monkeypatch.setattr(models, 'save_checkpoint', full_at_first)
    assert main_of('train_at', [*TINY, '--model-dir', tmp_path / 'a'], monkeypatch) == 0
    told = capsys.readouterr().err
    assert (
        'No space left' in told
        and str(tmp_path / 'a') in told
        and (tmp_path / 'a' / 'last.pt').exists()
    )

    def full(content, path):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(models, 'save_checkpoint', full)
    assert main_of('train_at', [*TINY, '--model-dir', tmp_path / 'b'], monkeypatch) == 1
    assert 'No space left' in capsys.readouterr().err.splitlines()[-1]


def test_a_save_that_breaks_off_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    models.save_checkpoint({'epoch': 1}, tmp_path / 'last.pt')

    def broken(content, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', broken)
    with pytest.raises(OSError):
        models.save_checkpoint({'epoch': 2}, tmp_path / 'last.pt')
    assert models.read_checkpoint(tmp_path / 'last.pt') == {'epoch': 1}


def test_out_of_memory_names_batch_and_network(tmp_path, capsys, monkeypatch):
    import train_at

    def attack(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(train_at, 'attack', attack)
    assert main_of('train_at', [*TINY, '--model-dir', tmp_path], monkeypatch) == 1
    told = capsys.readouterr().err
    assert 'smallcnn' in told and '32' in told and told.count('\n') == 1


def test_the_second_process_on_a_directory_is_refused(runs, tmp_path, capsys, monkeypatch):
    lock = models.claim_directory(tmp_path, new=True)
    assert 'another process' in fails(
        'train_at', [*TINY, '--model-dir', tmp_path], capsys, monkeypatch
    )
    lock.close()
    again = models.claim_directory(tmp_path, new=True)  # the lock is no file that is left behind
    again.close()


# ---------------------------------------------------------------- several processes

SEVERAL = """import importlib, sys, torch
torch.nn.Dropout.forward = lambda self, x: x
out, args = sys.argv[1], sys.argv[2:]
for algorithm in ('at', 'trades', 'mart', 'gairat'):
    for name, flags in (('plain', []), ('ew', ['--entropy-weight'])):
        sys.argv = [algorithm, *args, *flags, '--model-dir', f'{out}/{algorithm}-{name}']
        importlib.import_module(f'train_{algorithm}').main()
"""


def torchrun(script, *args, cwd):
    return subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc-per-node=2',
            str(script),
            *map(str, args),
        ],
        cwd=cwd,
        text=True,
        timeout=300,
        capture_output=True,
        env=os.environ | THREADS | {'PYTHONPATH': str(ROOT)},
    )


def test_two_processes_are_one(tmp_path):
    (tmp_path / 'all.py').write_text(SEVERAL)
    # 70 images in batches of 23: shares of 12 and 11, and a last batch of one: one share is empty
    args = [*TINY, '--train-size', 70, '--batch-size', 23, '--epochs', 1, '--lr', 0.05]
    one = subprocess.run(
        [sys.executable, 'all.py', 'one', *map(str, args)],
        cwd=tmp_path,
        text=True,
        timeout=300,
        capture_output=True,
        env=os.environ | THREADS | {'PYTHONPATH': str(ROOT)},
    )
    assert one.returncode == 0, one.stderr
    two = torchrun('all.py', 'two', *args, cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    for run_of_one in sorted((tmp_path / 'one').iterdir()):
        a, b = (
            models.read_checkpoint(d / 'last.pt')
            for d in (run_of_one, tmp_path / 'two' / run_of_one.name)
        )
        for k in a['state_dict']:
            assert (a['state_dict'][k] - b['state_dict'][k]).abs().max() < 1e-5, (
                run_of_one.name,
                k,
            )
        assert a['log'][0]['pgd10'] == b['log'][0]['pgd10'] and a['log'][0][
            'loss'
        ] == pytest.approx(b['log'][0]['loss'], abs=1e-5)


def test_several_processes_resume_as_well(tmp_path):
    """SIGTERM to torchrun inside an epoch; resumed, the run ends as one that went through."""
    only_at = SEVERAL.replace("('at', 'trades', 'mart', 'gairat')", "('at',)")
    (tmp_path / 'all.py').write_text(only_at)
    assert torchrun('all.py', 'whole', *TINY, cwd=tmp_path).returncode == 0
    train = tmp_path / 'train.py'
    train.write_text(
        'import torch, train_at\ntorch.nn.Dropout.forward = lambda self, x: x\ntrain_at.main()\n'
    )
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command = [*launcher, '--nproc-per-node=2', train, *TINY]
    run_of_two = subprocess.Popen(
        [*command, '--model-dir', 'cut', '--save-every-minutes', '0.0001'], cwd=tmp_path,
        env=os.environ | THREADS | {'PYTHONPATH': str(ROOT)}, stderr=subprocess.PIPE, text=True)
    last = tmp_path / 'cut' / 'last.pt'
    while run_of_two.poll() is None:
        if last.exists() and models.read_checkpoint(last)['step'] >= 1:
            run_of_two.send_signal(signal.SIGTERM)
            break
        time.sleep(0.002)
    assert '--resume cut' in run_of_two.communicate(timeout=100)[1]
    assert models.read_checkpoint(last)['step'] >= 1
    assert torchrun(train, '--resume', 'cut', cwd=tmp_path).returncode == 0
    same_run(tmp_path / 'cut', tmp_path / 'whole' / 'at-plain')


def test_a_process_that_dies_takes_the_run_down(tmp_path):
    (tmp_path / 'dies.py').write_text(
        'import os, train_at\nattack, steps = train_at.attack, []\n'
        'def dies(*args):\n    steps.append(1)\n'
        "    if os.environ['RANK'] == '1' and len(steps) == 3:\n        os._exit(9)\n"
        '    return attack(*args)\ntrain_at.attack = dies\ntrain_at.main()\n'
    )
    done = torchrun('dies.py', *TINY, '--model-dir', tmp_path / 'run', cwd=tmp_path)
    assert done.returncode != 0 and 'exitcode' in done.stderr and ': 9' in done.stderr


# ---------------------------------------------------------------- data, schedules, speed


def parsed(*args, script='train_at'):
    return importlib.import_module(script).parse_args(['--dataset', 'digits', *map(str, args)])[0]


def training_data(*args):
    return evaluate.TrainingData(parsed(*args), torch.device('cpu'))


def test_an_epoch_is_each_image_once():
    data = training_data('--train-size', 100)
    torch.manual_seed(0)
    batches = data.draw_epoch()
    assert [len(index) for index, _ in batches] == [32, 32, 32, 4] and data.images_per_epoch == 100
    assert sorted(torch.cat([index for index, _ in batches]).tolist()) == list(range(100))
    x, y = data.take(batches[0])
    assert torch.equal(x, data.images[batches[0][0]]) and torch.equal(y, data.labels[batches[0][0]])


def test_validation_images_are_the_last_of_each_class_and_never_trained_on():
    images, labels = evaluate.load_data('digits')
    data = training_data('--val-size', 50)
    held_images, held_labels = data.held_out
    assert torch.bincount(held_labels).tolist() == [5] * 10 and len(data.labels) == 1437 - 50
    for k in range(10):
        assert torch.equal(held_images[held_labels == k], images[labels == k][-5:])
        assert torch.equal(data.images[data.labels == k], images[labels == k][:-5])
    drawn = torch.cat([index for index, _ in data.draw_epoch()])
    assert drawn.max() < len(data.images)  # indices into what is left


@pytest.fixture
def extra(tmp_path):
    """An .npz of 50 images whose pixels are all their index + 100."""
    path = tmp_path / 'extra.npz'
    images = np.broadcast_to(
        np.arange(100, 150, dtype=np.uint8)[:, None, None, None], (50, 28, 28, 1)
    )
    np.savez(path, image=images, label=np.arange(50) % 10)
    return path


@pytest.mark.parametrize('mapped', [False, True])
def test_extra_images_make_up_their_fraction_of_every_batch(extra, mapped, monkeypatch):
    data = training_data(
        '--train-size', 100, '--extra-data', extra, '--extra-fraction', 0.7, '--batch-size', 20
    )
    if mapped:
        data.extra = evaluate._map_npz(extra, 'image'), data.extra[1]
        assert isinstance(data.extra[0], np.memmap)
    torch.manual_seed(0)
    batches, seen = data.draw_epoch(), []
    assert len(batches) == 5  # what the 100 originals alone make
    for batch in batches:
        x, y = data.take(batch)
        assert x.shape == (20, 1, 28, 28) and x.dtype == torch.uint8
        assert torch.equal(x[:6], data.images[batch[0]]) and torch.equal(
            y[:6], data.labels[batch[0]]
        )
        value = x[6:, 0, 0, 0].long()
        assert (x[6:] == value[:, None, None, None]).all() and torch.equal(
            y[6:], (value - 100) % 10
        )
        seen += value.tolist()
    counts = np.bincount(np.array(seen) - 100, minlength=50)
    assert counts.min() >= 1 and counts.max() <= 2  # 70 draws from 50, evenly
    assert len(training_data('--extra-data', extra, '--steps-per-epoch', 7).draw_epoch()) == 7


def test_bad_extra_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, labels = np.zeros((4, 28, 28, 1), np.uint8), np.zeros(4, int)
    cases = [
        dict(image=good.astype(float), label=labels),
        dict(image=good[:, :8], label=labels),
        dict(image=good, label=labels[:3]),
        dict(image=good, label=labels + 10),
        dict(image=good, label=labels - 1),
        dict(image=good, label=labels + 0.5),
        dict(image=good),
        dict(image=np.array([Path()] * 4, dtype=object), label=labels),
    ]
    for i, case in enumerate(cases):
        np.savez(tmp_path / 'bad.npz', **case)
        assert 'bad.npz' in fails(
            'train_at', [*TINY, '--extra-data', 'bad.npz'], capsys, monkeypatch
        ), i
    (tmp_path / 'bad.npz').write_text('no zip')
    assert 'bad.npz' in fails('train_at', [*TINY, '--extra-data', 'bad.npz'], capsys, monkeypatch)
    assert 'none.npz' in fails('train_at', [*TINY, '--extra-data', 'none.npz'], capsys, monkeypatch)
    assert 'multiple' in fails('train_at', [*TINY, '--val-size', 15], capsys, monkeypatch)
    np.savez(tmp_path / 'good.npz', image=good, label=labels)
    fails(
        'train_at',
        [*TINY, '--extra-data', 'good.npz', '--extra-fraction', 0.999],
        capsys,
        monkeypatch,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bad.npz', 'good.npz']


def test_a_run_with_everything_on(extra, tmp_path):
    done = run(
        'train_gairat.py',
        *TINY,
        '--entropy-weight',
        '--extra-data',
        extra,
        '--steps-per-epoch',
        3,
        '--val-size',
        20,
        '--ema',
        0.9,
        '--awp-gamma',
        0.005,
        '--awp-warmup',
        1,
        '--amp',
        '--lr-schedule',
        'onecycle',
        '--lr-warmup',
        0.5,
        '--begin-epoch',
        2,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / 'runs' / 'digits-ew-gairat-seed1' / 'log.csv')
    assert len(rows) == 2 and 0 <= float(rows[1]['ema_pgd10']) <= 1


def test_learning_rates_at_the_first_middle_and_last_step():
    from train_at import learning_rate

    def rates(*args):
        args = parsed('--epochs', 10, '--lr', 2, *args)
        return [
            learning_rate(args, e, p) for e, p in ((0, 0.0), (2, 0.0), (5, 0.0), (7, 0.5), (9, 1.0))
        ]

    assert rates('--lr-milestones', 5, 8) == pytest.approx([2, 2, 0.2, 0.2, 0.02])
    assert rates('--lr-schedule', 'cosine') == pytest.approx(
        [2, 1 + math.cos(0.2 * math.pi), 1, 1 + math.cos(0.75 * math.pi), 0]
    )
    assert rates('--lr-schedule', 'onecycle') == pytest.approx([0, 1, 2 * 5 / 6, 2 * 2.5 / 6, 0])
    assert rates('--lr-milestones', 9, '--lr-warmup', 4) == pytest.approx([0, 1, 2, 2, 0.2])


def awp_reference(model, losses, gamma):
    """In float64: the proxy network of the official code, stepped with SGD, then normalised."""
    proxy = copy.deepcopy(model)
    for learning_rate in (0.01, 3.0):  # cancels
        optimizer = torch.optim.SGD(proxy.parameters(), lr=learning_rate)
        proxy.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        (-losses(proxy).mean()).backward()
        optimizer.step()
        moved = {}
        for (name, old), new in zip(model.named_parameters(), proxy.parameters()):
            moved[name] = old.detach().clone()
            if old.dim() > 1:
                step = new.detach() - old.detach()
                moved[name] += gamma * old.detach().norm() / step.norm() * step
        yield moved


def test_weight_perturbation_is_the_official_proxy_network_and_goes_back_exactly():
    torch.manual_seed(0)
    model = models.build_model('resnet18', 4).double()
    x, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 4

    def losses(network):
        return torch.nn.functional.cross_entropy(network(x), y, reduction='none')

    references = list(awp_reference(model, losses, 0.02))
    before = copy.deepcopy(model.state_dict())
    with models.frozen_statistics(model):
        losses(model).mean().backward()
    assert torch.equal(model.bn1.running_mean, before['bn1.running_mean'])
    assert model.bn1.num_batches_tracked == 0
    kept = models.perturb_weights(model, 0.02)
    for name, parameter in model.named_parameters():
        for reference in references:
            assert torch.allclose(parameter, reference[name], atol=1e-9), name
        assert torch.equal(parameter, before[name]) == (parameter.dim() == 1), name
    models.restore_weights(kept)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    losses(model)
    assert model.bn1.num_batches_tracked == 1


@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_weight_perturbation_takes_the_update_at_the_moved_weights(
    algorithm, tmp_path, monkeypatch
):
    """One step of a run against the same step by hand; w comes from the unperturbed network."""
    script, given = importlib.import_module(f'train_{algorithm}'), []
    example_losses = script.example_losses

    def spy(model, *args, w=None, **options):
        losses, used = example_losses(model, *args, w=w, **options)
        given.append((copy.deepcopy(model.state_dict()), w, used))
        return losses, used

    monkeypatch.setattr(script, 'example_losses', spy)
    args = [
        *TINY,
        '--train-size',
        32,
        '--epochs',
        1,
        '--entropy-weight',
        '--awp-gamma',
        0.1,
        '--awp-warmup',
        0,
        '--model-dir',
        tmp_path / 'run',
    ]
    assert main_of(f'train_{algorithm}', args, monkeypatch) == 0
    (plain, none, w), (moved, w_again, w_used) = given
    assert none is None and torch.equal(w, w_again) and torch.equal(w, w_used)
    change = {
        k: (moved[k] - plain[k]).norm() / plain[k].norm() for k in plain if plain[k].dim() > 1
    }
    # the last layer starts at zero, and so do all gradients before it
    assert all(v == 0 or v == pytest.approx(0.1, rel=1e-3) or v.isnan() for v in change.values())
    last = models.read_checkpoint(tmp_path / 'run' / 'last.pt')['state_dict']
    for k in last:  # lr 0.02, momentum empty: the step is at most small, so AWP's own move is gone
        assert (last[k] - plain[k]).abs().max() < 0.02


def test_averaged_weights_are_the_exponential_average_with_the_latest_statistics():
    torch.manual_seed(0)
    model = models.build_model('resnet18', 3)
    ema, by_hand = models.copy_of(model), None
    for step in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        model.bn1.running_mean += 1
        models.average(ema, model, 0.9 * (step > 0))
        weights = [p.detach().double() for p in model.parameters()]
        by_hand = (
            weights if by_hand is None else [0.9 * a + 0.1 * p for a, p in zip(by_hand, weights)]
        )
    for a, p in zip(by_hand, ema.parameters()):
        assert torch.allclose(a.float(), p, atol=1e-5)
    assert torch.equal(ema.bn1.running_mean, model.bn1.running_mean)


@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_bfloat16_agrees_to_its_precision(algorithm):
    script = importlib.import_module(f'train_{algorithm}')
    torch.manual_seed(0)
    model = models.build_model('preactresnet18', in_channels=1).eval()
    x, y = torch.rand(8, 1, 16, 16), torch.arange(8)
    x_adv = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    adv = (x_adv, torch.arange(8.0) % 3) if algorithm == 'gairat' else x_adv
    options = {'num_steps': 2} if algorithm == 'gairat' else {}
    (losses, w), (losses_amp, w_amp) = [
        (
            setattr(model, 'amp', amp),
            script.example_losses(model, x, adv, y, entropy_weight=True, **options),
        )[1]
        for amp in (False, True)
    ]
    assert losses_amp.dtype == w_amp.dtype == model(x).dtype == torch.float32
    assert torch.allclose(losses, losses_amp, rtol=0.05, atol=0.05) and not torch.equal(
        losses, losses_amp
    )
    assert torch.allclose(w, w_amp, atol=1e-2)


def test_bfloat16_sees_weights_that_changed():
    model = models.build_model('smallcnn').eval()
    model.amp = True
    with torch.no_grad():
        x = torch.rand(2, 1, 28, 28)
        before = model(x)
        model.classifier.fc3.bias += 1
        assert torch.allclose(model(x), before + 1, atol=0.02)


def test_a_step_keeps_mode_gradients_and_memory_format(tmp_path, monkeypatch):
    import train_trades

    formats, networks = [], []
    attack = train_trades.attack

    def spy(model, x, *args):
        assert not any(p.requires_grad for p in model.parameters())  # the attack needs none of them
        networks.append(model)
        x_adv = attack(model, x, *args)
        formats.append([t.is_contiguous(memory_format=torch.channels_last) for t in (x, x_adv)])
        return x_adv

    monkeypatch.setattr(train_trades, 'attack', spy)
    monkeypatch.setattr(
        evaluate,
        '_load_digits',
        lambda train: (torch.randint(256, (8, 3, 28, 28), dtype=torch.uint8), torch.arange(8)),
    )
    monkeypatch.setitem(
        evaluate.DATASETS, 'digits', evaluate.DATASETS['digits'] | {'in_channels': 3}
    )
    args = [
        *TINY[:2],
        '--epochs',
        1,
        '--num-steps',
        1,
        '--arch',
        'preactresnet18',
        '--no-cuda',
        '--model-dir',
        tmp_path,
    ]
    assert main_of('train_trades', args, monkeypatch) == 0
    assert formats == [[True, True]] and networks[0].training
    assert all(p.requires_grad for p in networks[0].parameters())
    assert networks[0].layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


class Waits(TorchDispatchMode):
    """Counts the operations for which, on a GPU, the host would wait."""

    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        aten, (values, *more) = torch.ops.aten, args or (None,)
        masks = more[0] if f is aten.index.Tensor else ()
        self.count += any(i is not None and i.dtype == torch.bool for i in masks)
        self.count += f.overloadpacket in (
            aten._local_scalar_dense,
            aten.nonzero,
            aten.masked_select,
            aten.equal,
        )
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_no_step_waits_for_the_device(algorithm, tmp_path, monkeypatch):
    """Twice the steps, in the real loop with everything on, wait no more often."""
    options = '--dataset digits --batch-size 8 --epochs 1 --test-size 8 --num-steps 2 --no-cuda '
    options += '--entropy-weight --ema 0.9 --awp-gamma 0.01 --awp-warmup 0'
    waits = []
    for size in (24, 48):
        args = [*options.split(), '--train-size', size, '--model-dir', tmp_path / str(size)]
        with Waits() as mode:
            assert main_of(f'train_{algorithm}', args, monkeypatch) == 0
        waits.append(mode.count)
    assert waits[0] == waits[1] > 0


@pytest.mark.parametrize(
    'arch, amp',
    [('smallcnn', '--no-amp'), ('preactresnet18', '--amp'), ('wideresnet10-1', '--amp')],
)
def test_a_network_compiles_whole_and_once_for_each_use(arch, amp, monkeypatch):
    """And is then compiled no more: not for a last batch, moved weights or another epoch."""
    import train_trades

    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch,
        'compile',
        lambda f, mode, dynamic: compile_(f, backend=backend, dynamic=dynamic, fullgraph=True),
    )
    torch._dynamo.reset()
    model = models.build_model(arch, in_channels=1)
    models.accelerate(model, parsed(amp, '--compile', '--batch-size', 4, '--test-batch-size', 6))
    images, labels = evaluate.load_data('digits', train=False, size=12)
    if arch != 'smallcnn':
        images = images[:, :, 8:20, 8:20].contiguous()
    after = []
    for _ in range(2):
        for size in (4, 3):
            x, y = evaluate.to_float(images[:size]), labels[:size]
            model.requires_grad_(False)
            x_adv = train_trades.attack(model, x, x, y, 0.02, 0.1, 2)
            model.requires_grad_(True)
            for moving in (True, False):
                with models.frozen_statistics(model, moving):
                    losses, _ = train_trades.example_losses(model, x, x_adv, y, entropy_weight=True)
                losses.mean().backward()
                if moving:
                    moved = models.perturb_weights(model, 0.01)
            models.restore_weights(moved)
        evaluate.evaluate_epoch(model, images, labels, 0.1, 6, seed=1)
        after.append(len(graphs))
    # attack with and without gradient, loss, the same with statistics frozen, evaluation
    assert after[0] == after[1] <= 6


def test_compiled_for_two_batch_sizes_and_no_more(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch, 'compile', lambda f, **options: lambda x: (compiled.append(len(x)), f(x))[1]
    )
    model = models.build_model('smallcnn').eval()
    names = list(model.state_dict())
    models.accelerate(model, args := parsed('--compile', '--test-batch-size', 9))
    for size in (32, 9, 7, 32):
        assert model(torch.rand(size, 1, 28, 28)).shape == (size, 10)
    assert compiled == [32, 9, 32] and list(model.state_dict()) == names and args.amp is False
    compiled.clear()
    model = models.build_model('smallcnn').eval()
    models.accelerate(model, parsed('--compile', '--batch-size', 8), world=3)
    for size in (4, 3, 2):
        model(torch.rand(size, 1, 28, 28))
    assert compiled == [3, 2]


def test_evaluation_takes_no_gradients_of_weights():
    images, labels = evaluate.load_data('digits', train=False, size=8)
    model, seen = models.build_model('smallcnn'), []
    model.classifier.fc1.weight.requires_grad_(False)
    needed = [p.requires_grad for p in model.parameters()]
    model.register_forward_hook(
        lambda *_: seen.append(any(p.requires_grad for p in model.parameters()))
    )
    evaluate.evaluate_epoch(model, images, labels, 0.1, 8, seed=1)
    assert len(seen) == 12 and not any(seen)
    assert [p.requires_grad for p in model.parameters()] == needed and model.training


@pytest.mark.parametrize('kind, backend', [('cuda', 'cpu:gloo,cuda:nccl'), ('cpu', 'gloo')])
def test_processes_talk_of_tensors_on_gpus_and_cpus(kind, backend, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', asked.append)
    monkeypatch.setattr(models.atexit, 'register', lambda f: None)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setenv('WORLD_SIZE', '4')
    monkeypatch.setenv('RANK', '3')
    assert models.init_processes(torch.device(kind)) == (3, 4) and asked == [backend]


def test_one_process_downloads_at_a_time(tmp_path, monkeypatch):
    import fcntl
    import torchvision

    class Images:
        base_folder, data, targets = 'x', np.zeros((1, 32, 32, 3), np.uint8), [0]

        def __init__(self, root, train, download=False):
            if not download:
                raise RuntimeError('Dataset not found')
            with open(os.path.join(root, '.lock')) as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', Images)
    assert len(evaluate.load_data('cifar10', str(tmp_path / 'new'))[0]) == 1


def test_an_average_runs_its_own_weights_in_the_precision_of_the_model(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda f, **options: f)
    model = models.build_model('smallcnn').eval()
    models.accelerate(model, parsed('--amp', '--compile', '--test-batch-size', 9))
    average, x = models.copy_of(model), torch.rand(9, 1, 28, 28)
    nn.init.ones_(model.classifier.fc3.weight)
    assert average.amp and model(x).any() and not average(x).any()


def test_a_network_whose_outputs_are_overwritten_by_its_next_run_is_measured_right(monkeypatch):
    """So do CUDA graphs, --compile reduce-overhead."""
    memory = torch.empty(24, 10)

    def graph(f, **options):
        return lambda x: f(x) if torch.is_grad_enabled() else memory.copy_(f(x))

    images, labels = evaluate.load_data('digits', train=False, size=24)
    model = models.build_model('smallcnn')
    nn.init.normal_(model.classifier.fc3.weight)
    rows = [evaluate.evaluate_epoch(model, images, labels, 0.3, 24, seed=1)]
    monkeypatch.setattr(torch, 'compile', graph)
    models.accelerate(model, parsed('--compile', '--test-batch-size', 24))
    rows += [evaluate.evaluate_epoch(model, images, labels, 0.3, 24, seed=1)]
    assert rows[0] == rows[1] and rows[0]['clean'] != rows[0]['pgd10']


# ---------------------------------------------------------------- evaluate.py and the loader


class Affine(nn.Module):
    """Logits scale * (W x + b), for images of any shape."""

    def __init__(self, weight, bias, scale=1.0):
        super().__init__()
        self.weight, self.bias, self.scale = nn.Parameter(weight), nn.Parameter(bias), scale

    def forward(self, x):
        return self.scale * F.linear(x.flatten(1), self.weight, self.bias)


def evaluated(capsys, *argv):
    """(exit status, stdout, stderr) of the command."""
    try:
        evaluate.main([str(a) for a in argv])
        code = 0
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def accuracies(out):
    """The first table in stdout: {model: {column: percent}}."""
    lines = [[cell.strip() for cell in line.strip('|').split('|')]
             for line in out.splitlines() if line.startswith('|')]
    rows = {}
    for line in lines[2:]:
        if line[0] == 'model':
            break
        rows[line[0]] = {head: float(cell) for head, cell in zip(lines[0][2:], line[2:])}
    return rows


@pytest.fixture(scope='module')
def trained():
    """A SmallCNN trained on clean digits for a moment: accurate, and not robust."""
    torch.manual_seed(0)
    images, labels = evaluate.load_data('digits')
    model = models.build_model('smallcnn')
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(50):
        index = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(evaluate.to_float(images[index])), labels[index]).backward()
        optimizer.step()
    return model.eval().to(memory_format=torch.channels_last)  # as the command has it


@pytest.fixture
def run_directory(trained, tmp_path):
    """A run's directory as training leaves it."""
    return make_run(tmp_path / 'digits-at-seed1', trained)


def make_run(directory, model, scale=1.0):
    directory.mkdir(parents=True)
    state = {k: v * scale if 'fc3' in k else v for k, v in model.state_dict().items()}
    models.save_checkpoint({'state_dict': state, 'arch': 'smallcnn', 'dataset': 'digits',
                            'algorithm': 'at', 'args': {'epsilon': 0.1}, 'epoch': 2, 'log': []},
                           directory / 'best.pt')
    with open(directory / 'log.csv', 'w') as f:
        f.write('epoch,lr,loss,clean,pgd10,entropy,high_entropy,images_per_s,seconds\n'
                '1,0.1,2.0,0.5,0.3,2.0,0.9,10,1\n2,0.1,1.8,0.7,0.4,1.9,0.8,10,2\n3,0.1,1.')
    return directory


# ---------------------------------------------------------------- attacks

@pytest.mark.parametrize('attack', ['fgsm', 'pgd10', 'pgd20', 'pgd100', 'ls'])
def test_linear_model_has_its_exact_robust_accuracy(attack):
    torch.manual_seed(0)
    n, epsilon = 60, 0.1
    images = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8)
    w = torch.randn(16)
    x = evaluate.to_float(images).flatten(1)
    b = -(x @ w).median()
    model = Affine(torch.stack([-w / 2, w / 2]), torch.stack([-b / 2, b / 2]))
    labels = (x @ w + b > 0).long()
    labels[:5] = 1 - labels[:5]
    # the worst point of the box [x - eps, x + eps] and [0, 1] is a corner of it
    sign = (2 * labels - 1)[:, None]
    worst = (x - epsilon * sign * w.sign()).clamp(0, 1)
    robust = ((worst @ w + b) * sign[:, 0] > 0).numpy()
    assert 5 < robust.sum() < 40
    x_adv = evaluate.run_attack(attack, model, x.view(n, 1, 4, 4), labels, epsilon)
    torch.testing.assert_close(x_adv.flatten(1), worst, atol=1e-6, rtol=0)
    correct, _ = evaluate.evaluate_attack(model, images, labels, attack, epsilon, batch_size=25)
    assert (correct == robust).all()


def test_steps_scale_with_epsilon():
    assert evaluate.pgd_options('pgd10', 8 / 255)['step_size'] == pytest.approx(2 / 255)
    assert evaluate.pgd_options('pgd100', 8 / 255)['step_size'] == pytest.approx(2 / 255)
    assert evaluate.pgd_options('pgd20', 0.3) == dict(step_size=pytest.approx(0.03), num_steps=20,
                                                      logit_scale=1.0, random_start=True)
    assert evaluate.pgd_options('ls', 0.3)['logit_scale'] == 10
    assert not evaluate.pgd_options('fgsm', 0.3)['random_start']


def test_ls_at_scale_1_is_pgd_bit_for_bit(trained):
    images, labels = evaluate.load_data('digits', train=False, size=24)
    x = evaluate.to_float(images)
    pgd = evaluate.run_attack('pgd20', trained, x, labels, 0.05)
    assert torch.equal(pgd, evaluate.run_attack('ls', trained, x, labels, 0.05, ls_scale=1.0))
    assert not torch.equal(pgd, evaluate.run_attack('ls', trained, x, labels, 0.05, ls_scale=10.0))


@pytest.mark.parametrize('scale, ls_scale', [(1e-3, 10.0), (1e4, 1e-4)])
def test_ls_finds_what_masked_gradients_hide_from_pgd(scale, ls_scale):
    """Class 1 is reached by raising the pixel by 0.09. Eight far classes pull the other way.

    With tiny logits the softmax is flat and the eight outweigh class 1; with huge ones the gradient
    is exactly zero in float32. Either way PGD calls robust what is not.
    """
    weight = torch.tensor([[0.0]] + [[1.0]] + [[-1.0]] * 8)
    bias = torch.tensor([0.0] + [-0.09 - 0.5] + [-1000.0] * 8)
    model = Affine(weight, bias, scale)
    images = torch.full((100, 1, 1, 1), 127, dtype=torch.uint8)  # 0.498
    labels = torch.zeros(100, dtype=torch.int64)
    pgd, _ = evaluate.evaluate_attack(model, images, labels, 'pgd20', 0.1)
    ls, _ = evaluate.evaluate_attack(model, images, labels, 'ls', 0.1, ls_scale=ls_scale)
    assert pgd.mean() > 0.85 and ls.mean() == 0


def test_restarts_only_ever_find_more():
    """Without a gradient a random start is all: each is misclassified with probability 1/4."""
    model = Affine(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, -0.05 - 127 / 255]), 1e6)
    images = torch.full((200, 1, 1, 1), 127, dtype=torch.uint8)
    labels = torch.zeros(200, dtype=torch.int64)
    one, several = (evaluate.evaluate_attack(model, images, labels, 'pgd20', 0.1,
                                             restarts=r)[0] for r in (1, 3))
    assert 0.65 < one.mean() < 0.85 and 0.3 < several.mean() < 0.55
    assert not (several & ~one).any()


def test_an_attack_that_leaves_the_ball_is_an_error(trained, monkeypatch):
    images, labels = evaluate.load_data('digits', train=False, size=4)
    for wrong in (lambda x: x + 0.2, lambda x: x - 0.01, lambda x: x * math.nan):
        monkeypatch.setattr(evaluate, 'pgd_attack', lambda model, x, *_, **__: wrong(x))
        with pytest.raises(RuntimeError, match='left the ball'):
            evaluate.evaluate_attack(trained, images, labels, 'pgd20', 0.1)


def test_standard_training_is_not_robust(trained):
    images, labels = evaluate.load_data('digits', train=False, size=100)
    assert evaluate.evaluate_attack(trained, images, labels, 'clean', 0)[0].mean() > 0.85
    assert evaluate.evaluate_attack(trained, images, labels, 'pgd20', 0.2)[0].mean() < 0.05


def test_real_cifar10_model():
    """pyautoattack carries a standardly trained ResNet-18; DATA_DIR says where CIFAR-10 is."""
    pyautoattack = pytest.importorskip('pyautoattack')
    path = os.path.join(os.path.dirname(pyautoattack.__file__), 'examples', 'model_test.pt')
    data_dir = os.environ.get('DATA_DIR', './data')
    if not os.path.isdir(os.path.join(data_dir, 'cifar-10-batches-py')) or not os.path.isfile(path):
        pytest.skip('CIFAR-10 is not there')
    model = models.load_model(path, num_classes=10)
    images, labels = evaluate.load_data('cifar10', data_dir, False, 500)
    clean, _ = evaluate.evaluate_attack(model, images, labels, 'clean', 0)
    assert clean.mean() == pytest.approx(0.946, abs=0.003)
    pgd, _ = evaluate.evaluate_attack(model, images[:16], labels[:16], 'pgd10', 8 / 255)
    assert pgd.sum() == 0


# ---------------------------------------------------------------- AutoAttack

@pytest.fixture(scope='module')
def linear10():
    """A linear model of ten classes on 5 x 5 images, with labels of which it gets all but two."""
    torch.manual_seed(3)
    images = torch.randint(0, 256, (9, 1, 5, 5), dtype=torch.uint8)
    model = Affine(torch.randn(10, 25), torch.randn(10))
    labels = model(evaluate.to_float(images)).argmax(1).detach()
    labels[:2] = (labels[:2] + 1) % 10
    return model, images, labels


def test_autoattack_is_the_standard_one_and_below_each_of_its_attacks(linear10):
    pyautoattack = pytest.importorskip('pyautoattack')
    model, images, labels = linear10
    attacks = ['pgd20', 'autoattack', *evaluate.AUTOATTACK]
    columns = evaluate.plan_columns(attacks, 0.06, 0.06)
    state = torch.get_rng_state()
    outcome, _ = evaluate.evaluate_model(model, images, labels, columns, batch_size=8, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    worst = outcome['autoattack']
    assert 0 < worst.sum() < 7 == outcome['clean'].sum()
    for name in evaluate.AUTOATTACK:
        assert not (worst & ~outcome[name]).any(), name
    chain = ['clean', 'aa: apgd-ce', 'aa: + apgd-t', 'aa: + fab-t', 'autoattack']
    for before, after in zip(chain, chain[1:]):
        assert not (outcome[after] & ~outcome[before]).any()
    official = pyautoattack.AutoAttack(model, norm='Linf', eps=0.06, seed=5, version='standard')
    x = evaluate.to_float(images).contiguous()
    _, y_adv = official.run_standard_evaluation(x, labels, batch_size=8)
    assert ((y_adv == labels).numpy() == worst).all()


def test_the_github_package_serves_as_well(linear10, monkeypatch, capsys):
    model, images, labels = linear10
    seen = []

    class Part:
        targeted = False

        def perturb(self, x, y):
            print('noise')
            torch.manual_seed(0)
            seen.append((self.targeted, model.training, x.dtype, len(x)))
            return (x + 0.01).clamp(0, 1)

    class AutoAttack:  # the signature of GitHub's
        def __init__(self, model, norm='Linf', eps=.3, seed=None, verbose=True, attacks_to_run=[],
                     version='standard', is_tf_model=False, device='cuda', log_path=None):
            assert (norm, eps, version, str(device)) == ('Linf', 0.06, 'standard', 'cpu')
            print('setting parameters for standard version')
            self.apgd, self.apgd_targeted, self.fab, self.square = (Part() for _ in range(4))

    monkeypatch.setitem(sys.modules, 'pyautoattack', None)
    monkeypatch.setitem(sys.modules, 'autoattack', types.SimpleNamespace(AutoAttack=AutoAttack))
    model.train()
    evaluate.evaluate_attack(model, images, labels, 'fab-t', 0.06)
    assert seen == [(True, False, torch.float32, 9)] and model.training
    assert capsys.readouterr().out == ''
    state = torch.get_rng_state()
    evaluate.auto_attack('square', model, evaluate.to_float(images), labels, 0.06, 1)
    assert torch.equal(state, torch.get_rng_state())


def test_targeted_attacks_need_ten_classes():
    pytest.importorskip('pyautoattack')
    model = Affine(torch.randn(9, 4), torch.randn(9))
    images, labels = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match='9 wrong classes'):
        evaluate.evaluate_attack(model, images, labels, 'apgd-t', 0.1)


# ---------------------------------------------------------------- evaluation

def test_train_mode_is_evaluated_in_eval_mode_and_left_as_it_was():
    torch.manual_seed(0)
    images, labels = evaluate.load_data('digits', train=False, size=32)
    model = nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5),
                          nn.Linear(256, 10))
    model(evaluate.to_float(images))
    expected, _ = evaluate.evaluate_attack(model.eval(), images, labels, 'pgd10', 0.02)
    model.train()
    model[1].eval()  # frozen
    model[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(123)
    state = torch.get_rng_state()
    correct, _ = evaluate.evaluate_attack(model, images, labels, 'pgd10', 0.02)
    assert (correct == expected).all()
    assert [m.training for m in model] == [True, False, True, True, True] and model.training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


PRECISIONS = """
import torch
import evaluate, models

units = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul,
         torch.backends.mkldnn.conv)

def state():
    cudnn = torch.backends.cudnn
    return [u.fp32_precision for u in units], cudnn.deterministic, cudnn.benchmark

for setting in ('', 'set_float32_matmul_precision("medium")', 'backends.cudnn.benchmark = True',
                'backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True',
                'backends.fp32_precision = "tf32"'):
    if setting:
        exec('torch.' + setting)
    before = state()
    with evaluate.exact(models.build_model('smallcnn'), torch.device('cpu')):
        assert state() == (['ieee'] * 4, True, False), (setting, state())
    assert state() == before, (setting, before, state())
"""


def test_evaluation_is_without_tf32_however_it_was_set(tmp_path):
    """In a process of its own: torch refuses to read its older settings once newer ones are set."""
    (tmp_path / 'set.py').write_text(PRECISIONS)
    done = run(tmp_path / 'set.py', cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_evaluation_is_in_float32_whatever_training_was(trained):
    images, labels = evaluate.load_data('digits', train=False, size=32)
    _, expected = evaluate.evaluate_attack(trained, images, labels, 'pgd20', 0.1)
    trained.amp = True
    try:
        _, entropies = evaluate.evaluate_attack(trained, images, labels, 'pgd20', 0.1)
        assert trained.amp
    finally:
        trained.amp = False
    assert (entropies == expected).all()


def test_pgd10_is_that_of_the_training_log(trained):
    images, labels = evaluate.load_data('digits', train=False, size=50)
    log = evaluate.evaluate_epoch(trained, images, labels, 0.04, 20, seed=3)
    correct, _ = evaluate.evaluate_attack(trained, images, labels, 'pgd10', 0.04, batch_size=20,
                                          seed=3)
    assert 0 < correct.mean() == log['pgd10'] < 1


def test_entropy_report_against_numpy(trained):
    images, labels = evaluate.load_data('digits', train=False, size=40)
    correct, entropies = evaluate.evaluate_attack(trained, images, labels, 'pgd20', 0.03,
                                                  batch_size=16)
    z = []
    for i in range(0, 40, 16):
        x, y = evaluate.to_float(images[i:i + 16]), labels[i:i + 16]
        x_adv = evaluate.run_attack('pgd20', trained, x, y, 0.03, first=i)
        z.append(trained(x_adv).detach().double().numpy())
    z = np.concatenate(z)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    h = -(p * np.log(p)).sum(1)
    right = z.argmax(1) == labels.numpy()
    np.testing.assert_allclose(entropies, h, atol=1e-5)
    assert (correct == right).all() and 0 < right.mean() < 1
    t = float(np.median(h))
    report = evaluate.entropy_report(entropies, correct, t)
    assert report == pytest.approx({
        'entropy': h.mean(), 'high_entropy': (h > t).mean(),
        'accuracy_high_entropy': right[h > t].mean(),
        'accuracy_low_entropy': right[h <= t].mean()}, abs=1e-6)
    report = evaluate.entropy_report(entropies, correct, 9.0)
    assert report['high_entropy'] == 0 and math.isnan(report['accuracy_high_entropy'])
    assert report['accuracy_low_entropy'] == correct.mean()


def test_worst_case_attacks_only_what_still_stands(trained):
    images, labels = evaluate.load_data('digits', train=False, size=40)
    columns = evaluate.plan_columns(['clean', 'fgsm', 'pgd20', 'ls'], 0.04, 0.04, worst_case=True)
    assert list(columns) == ['clean', '+ fgsm', '+ pgd20', 'worst case']
    attacked, run_attack = [], evaluate.run_attack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, 'run_attack', lambda attack, model, x, *rest, **options: (
            attacked.append(len(x)), run_attack(attack, model, x, *rest, **options))[1])
        outcome, entropies = evaluate.evaluate_model(trained, images, labels, columns)
    standing = [int(correct.sum()) for correct in outcome.values()]
    assert attacked == [40] + standing[:-1] and standing == sorted(standing, reverse=True)
    assert standing[-1] < standing[0] and entropies is None
    assert list(evaluate.plan_columns(['autoattack', 'ls'], 0.1, 0.2)) == [
        'clean', 'aa: apgd-ce', 'aa: + apgd-t', 'aa: + fab-t', 'autoattack', 'ls']
    assert evaluate.plan_columns(['autoattack'], 0.1, 0.2)['autoattack'] == (
        'square', 0.2, 'aa: + fab-t')
    assert evaluate.plan_columns(['ls', 'square'], 0.1, 0.2)['square'] == ('square', 0.2, 'clean')


# ---------------------------------------------------------------- the command

FAST = ['--attacks', 'clean', 'pgd20', 'ls', '--n-examples', 12, '--batch-size', 5,
        '--epsilon', 0.04]


def test_command(run_directory, trained, tmp_path, capsys):
    make_run(tmp_path / 'digits-ew-at-seed1', trained, 0.3)
    code, out, err = evaluated(capsys, '--model-path', run_directory / 'best.pt',
                         tmp_path / 'digits-ew-at-seed1' / 'best.pt', *FAST,
                         '--csv', tmp_path / 'a.csv', '--json', tmp_path / 'a.json')
    assert code == 0
    table = accuracies(out)
    assert list(table) == ['digits-at-seed1', 'digits-ew-at-seed1']
    assert list(table['digits-at-seed1']) == ['clean', 'pgd20 (0.04)', 'ls (0.04)']
    assert 'first 12 test images of digits' in out and '| digits-at-seed1 | 12 |' in out
    images, labels = evaluate.load_data('digits', train=False, size=12)
    correct, entropies = evaluate.evaluate_attack(trained, images, labels, 'pgd20', 0.04,
                                                  batch_size=5)
    assert table['digits-at-seed1']['pgd20 (0.04)'] == round(100 * correct.mean(), 2)
    with open(tmp_path / 'a.csv') as f:
        rows = list(csv.DictReader(f))
    assert float(rows[0]['pgd20 (0.04)']) == correct.mean() and rows[1]['n'] == '12'
    content = json.loads((tmp_path / 'a.json').read_text())
    assert content['models'][0]['report']['entropy'] == pytest.approx(entropies.mean(), abs=1e-6)
    assert content['args']['seed'] == 1 and 'torch' in content['versions']
    assert 'ls' in err and '\r' not in err  # lines, no bar, where it is no terminal


def test_finished_batches_are_not_evaluated_again(run_directory, capsys, monkeypatch):
    path, run_attack = run_directory / 'best.pt', evaluate.run_attack
    argv = ['--model-path', path, *FAST]
    _, expected, _ = evaluated(capsys, *argv)
    cache = json.loads((run_directory / 'best.pt.eval.json').read_text())
    assert sorted(map(len, cache.values())) == [3, 3, 3]
    (run_directory / 'best.pt.eval.json').unlink()
    calls = []

    def dies(*args, **options):
        calls.append(args[0])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return run_attack(*args, **options)
    monkeypatch.setattr(evaluate, 'run_attack', dies)
    code, out, err = evaluated(capsys, *argv)
    assert (code, out) == (130, '') and 'goes on' in err
    assert evaluated(capsys, *argv)[1] == expected and len(calls) == 5 + 5
    assert evaluated(capsys, *argv)[1] == expected and len(calls) == 10  # answers at once
    # what alters a result asks for it anew, and nothing else does: batches by changed argument
    for other, batches in ((['--seed', 2], 9), (['--batch-size', 6], 6), (['--epsilon', 0.05], 6),
                           (['--n-examples', 10], 6), (['--split', 'train'], 9),
                           (['--restarts', 2], 6), (['--ls-scale', 5], 3), (['--aa-epsilon', 1], 0),
                           (['--entropy-threshold', 1], 0), (['--no-cuda'], 0)):
        before = len(calls)
        evaluated(capsys, *argv, *other)
        assert len(calls) - before == batches, other


def test_a_killed_evaluation_goes_on_and_gives_the_same_table(run_directory, trained, tmp_path,
                                                              capsys):
    other = make_run(tmp_path / 'other' / 'digits-at-seed1', trained)
    argv = ['--attacks', 'pgd20', 'pgd100', '--n-examples', '20', '--batch-size', '4',
            '--epsilon', '0.04', '--no-cuda', '--model-path']
    path, cache = run_directory / 'best.pt', run_directory / 'best.pt.eval.json'
    killed = subprocess.Popen([sys.executable, str(ROOT / 'evaluate.py'), *argv, str(path)],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              env=os.environ | {'OMP_NUM_THREADS': '1'})
    deadline = time.time() + 60
    while time.time() < deadline and not (cache.exists() and 'pgd100' in cache.read_text()):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.communicate()[0] == b'' and killed.returncode == -signal.SIGKILL
    done = sum(map(len, json.loads(cache.read_text()).values()))
    assert 10 < done < 15
    (code, resumed, _), (_, uninterrupted, _) = evaluated(capsys, *argv, path), evaluated(
        capsys, *argv, other / 'best.pt')
    assert code == 0 and resumed == uninterrupted
    assert json.loads(cache.read_text()) == json.loads(
        (other / 'best.pt.eval.json').read_text())


def test_a_result_of_other_weights_is_never_taken(run_directory, trained, capsys):
    path = run_directory / 'best.pt'
    _, first, _ = evaluated(capsys, '--model-path', path, *FAST)
    content = torch.load(path, weights_only=True)
    content['state_dict']['classifier.fc3.bias'][4] += 3
    models.save_checkpoint(content, path)
    _, second, _ = evaluated(capsys, '--model-path', path, *FAST)
    (run_directory / 'best.pt.eval.json').unlink()
    _, fresh, _ = evaluated(capsys, '--model-path', path, *FAST)
    assert first != second == fresh
    _, normalized, _ = evaluated(capsys, '--model-path', path, *FAST, '--normalize', '0.1/0.5')
    assert normalized != fresh


@pytest.mark.parametrize('damage', [
    lambda text: b'', lambda text: b'{', lambda text: b'[]', lambda text: b'{"a": 5}',
    lambda text: b'7', lambda text: b'\xff\xfe\x00', lambda text: b'[' * 100000,
    lambda text: text[:-200].encode(),
    lambda text: text.replace('"correct": "', '"correct": "zz').encode(),
    lambda text: text.replace('"correct": "', '"correct": "00').encode(),
    lambda text: text.replace('"correct"', '"wrong"').encode(),
    lambda text: text.replace('"entropy": "', '"entropy": "00').encode()])
def test_a_damaged_cache_is_said_and_made_anew(damage, run_directory, capsys):
    argv = ['--model-path', run_directory / 'best.pt', '--attacks', 'pgd20', '--n-examples', 12]
    cache = run_directory / 'best.pt.eval.json'
    _, expected, _ = evaluated(capsys, *argv)
    good = cache.read_text()
    cache.write_bytes(damage(good))
    code, out, err = evaluated(capsys, *argv)
    assert (code, out) == (0, expected) and 'anew' in err
    assert json.loads(cache.read_text()) == json.loads(good)


def test_without_a_place_for_the_cache_it_goes_on_and_says_so_once(run_directory, capsys):
    (run_directory / 'best.pt.eval.json').mkdir()
    code, out, err = evaluated(capsys, '--model-path', run_directory / 'best.pt', *FAST)
    assert code == 0 and accuracies(out) and err.count('cannot be written') == 1


def test_two_evaluations_at_once_keep_both_results(run_directory):
    path = run_directory / 'best.pt'
    one, other = evaluate.Results(path), evaluate.Results(path)
    for i in range(3):
        one.known.setdefault('a', []).append({'correct': f'0{i}'})
        one.save()
        other.known.setdefault('b', []).append({'correct': f'1{i}'})
        other.save()
    assert {k: len(v) for k, v in evaluate.Results(path).known.items()} == {'a': 3, 'b': 3}


def test_figures(run_directory, trained, tmp_path, capsys, monkeypatch):
    import matplotlib.pyplot
    from PIL import Image
    monkeypatch.delenv('DISPLAY', raising=False)
    matplotlib.pyplot.switch_backend('svg')
    other, third = make_run(tmp_path / 'b', trained, 0.3), make_run(tmp_path / 'c', trained, 2.0)
    paths = [d / 'best.pt' for d in (run_directory, other, third)]
    code, out, _ = evaluated(capsys, '--model-path', *paths, '--attacks', 'fgsm', '--n-examples',
                             60, '--figures', tmp_path / 'figures', '--tsne-classes', 3, 8,
                             '--epsilon', 0.04)
    assert code == 0 and list(accuracies(out)['b']) == ['clean', 'fgsm (0.04)', 'pgd20 (0.04)']
    assert matplotlib.get_backend().lower() == 'agg'  # which no display is needed for
    names = ['entropy_histogram', 'entropy_vs_robustness', 'training_curves', 'tsne']
    assert sorted(os.listdir(tmp_path / 'figures')) == sorted(
        f'{name}.{kind}' for name in names for kind in ('csv', 'png'))
    tables = {}
    for name in names:
        image = Image.open(tmp_path / 'figures' / f'{name}.png').convert('RGB')
        assert image.size[0] == 700 and 350 < image.size[1] < 1000  # 3.5 inches at 200 dots
        assert len(image.getcolors(10 ** 6)) > 50  # drawn on, with smoothed edges
        with open(tmp_path / 'figures' / f'{name}.csv') as f:
            tables[name] = list(csv.DictReader(f))
    for column in ('digits-at-seed1', 'b', 'c'):
        share = sum(float(row[column]) for row in tables['entropy_histogram'])
        assert share == pytest.approx(100)
    points = [row['model'] for row in tables['entropy_vs_robustness']]
    assert points == ['digits-at-seed1', 'b', 'c']
    assert {row['class'] for row in tables['tsne']} == {'3', '8'}
    labels = evaluate.load_data('digits', train=False, size=60)[1]
    assert len(tables['tsne']) == 3 * ((labels == 3) | (labels == 8)).sum()
    assert [row['epoch'] for row in tables['training_curves']] == ['1.0', '2.0'] * 3


def test_names_tell_the_models_apart():
    assert evaluate.row_names(['runs/a/best.pt', 'runs/b/best.pt']) == ['a', 'b']
    assert evaluate.row_names(['runs/a/best.pt', 'runs/a/last.pt', 'x.pt']) == ['a', 'a/last', 'x']
    assert evaluate.row_names(['r/a/best.pt', 's/a/best.pt']) == ['r/a/best.pt', 's/a/best.pt']


def test_epsilon_is_written_as_the_field_does():
    texts = [evaluate.epsilon_text(e) for e in (8 / 255, 0.031, 0.3, 1 / 255)]
    assert texts == ['8/255', '0.031', '0.3', '1/255']


BAD_EVALUATIONS = {
    'no such file': (['--model-path', 'nothing.pt'], 'nothing.pt: no such file'),
    'directory': (['--model-path', '.'], 'directory'),
    'text': (['--model-path', 'text.pt'], 'text.pt: not a checkpoint'),
    'truncated': (['--model-path', 'cut.pt'], 'cut.pt: cut off'),
    'code': (['--model-path', 'evil.pt'], 'system'),
    'wrong arch': (['--model-path', 'good.pt', '--arch', 'resnet18'], 'missing conv1.weight'),
    'unknown arch': (['--model-path', 'good.pt', '--arch', 'vgg'], "unknown arch 'vgg'"),
    'classes': (['--model-path', 'good.pt', '--dataset', 'cifar100'], '10 classes'),
    'channels': (['--model-path', 'good.pt', '--dataset', 'cifar10'], '1-channel'),
    'no data set': (['--model-path', 'bare.pt'], 'give one --dataset'),
    'attack': (['--model-path', 'good.pt', '--attacks', 'pgd7'], "'pgd7'"),
    'too many': (['--model-path', 'good.pt', '--n-examples', '361'], '360 test images'),
    'too few': (['--model-path', 'good.pt', '--n-examples', '0'], "'0'"),
    'epsilon': (['--model-path', 'good.pt', '--epsilon', '8'], '8/255'),
    'normalize': (['--model-path', 'good.pt', '--normalize', 'half'], "'half'"),
    'normalize channels': (['--model-path', 'good.pt', '--normalize', 'cifar10'], '1-channel'),
    'figures': (['--model-path', 'good.pt', '--figures', 'text.pt/x'], 'text.pt'),
    'csv': (['--model-path', 'good.pt', '--csv', 'no/such/a.csv'], 'cannot be written'),
    'json': (['--model-path', 'good.pt', '--json', '.'], 'cannot be written'),
    't-SNE': (['--model-path', 'good.pt', '--figures', 'f', '--tsne-classes', '0', 'cat'], 'cat'),
    'no model': ([], '--model-path'),
    'no data': (['--model-path', 'wide.pt', '--dataset', 'cifar10', '--data-dir', 'text.pt'],
                'could not be downloaded'),
}


class Evil:
    def __reduce__(self):
        return os.system, ('touch ran',)


def no_network(*args, **options):
    raise OSError('no network')


@pytest.mark.parametrize('case', BAD_EVALUATIONS)
def test_bad_input_is_one_line_and_exit_2(case, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('urllib.request.urlopen', no_network)
    state = trained.state_dict()
    torch.save({'state_dict': state, 'dataset': 'digits'}, 'good.pt')
    torch.save(state, 'bare.pt')
    torch.save({'state_dict': state, 'x': Evil()}, 'evil.pt')
    torch.save(models.build_model('wideresnet10-1').state_dict(), 'wide.pt')
    (tmp_path / 'text.pt').write_text('not a model\n')
    (tmp_path / 'cut.pt').write_bytes((tmp_path / 'good.pt').read_bytes()[:-500])
    argv, expected = BAD_EVALUATIONS[case]
    code, out, err = evaluated(capsys, *argv)
    assert code == 2 and out == '' and expected in err
    assert err.endswith('\n') and len(err.strip().splitlines()) == 1
    assert not (tmp_path / 'ran').exists()


def test_autoattack_not_installed_is_said_before_any_work(run_directory, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyautoattack', None)
    monkeypatch.setitem(sys.modules, 'autoattack', None)
    argv = ['--model-path', run_directory / 'best.pt', '--attacks', 'autoattack']
    code, out, err = evaluated(capsys, *argv)
    assert (code, out) == (2, '') and 'pip install pyautoattack' in err and err.count('\n') == 1


def test_help(capsys):
    code, out, _ = evaluated(capsys, '--help')
    assert code == 0 and '--aa-epsilon' in out and 'cifar10 8/255' in out


# ---------------------------------------------------------------- anyone's checkpoint

def small_networks():
    torch.manual_seed(0)
    return {'preactresnet18': models.build_model('preactresnet18', 7),
            'preactresnet18, no final BN': models.build_model('preactresnet18', 7, final_bn=False),
            'resnet18': models.build_model('resnet18', 7),
            'wideresnet16-1': models.build_model('wideresnet16-1', 7),
            'wideresnet10-2': models.build_model('wideresnet10-2', 100, in_channels=1),
            'smallcnn': models.build_model('smallcnn', 7)}


@pytest.mark.parametrize('name', small_networks())
def test_the_network_is_read_off_the_shapes(name, tmp_path):
    model = small_networks()[name].eval()
    models.save_checkpoint({'state_dict': model.state_dict()}, tmp_path / 'a.pt')
    loaded = models.load_model(tmp_path / 'a.pt')
    first, last = list(model.parameters())[0], list(model.parameters())[-1]
    x = torch.rand(2, first.shape[1], 28, 28)
    assert not loaded.training and len(last) in (7, 100)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match='a.pt: has'):
        models.load_model(tmp_path / 'a.pt', num_classes=11)


WRAPS = {
    'bare': lambda s: s,
    'state_dict': lambda s: {'state_dict': s, 'epoch': 3},
    'model_state_dict': lambda s: {'model_state_dict': s, 'loss': 0.1},
    'net': lambda s: {'net': s, 'acc': 93.1},
    'model': lambda s: {'model': s},
    'ema_state_dict': lambda s: {'ema_state_dict': {'n_averaged': torch.tensor(3)} | {
        f'module.{k}': v for k, v in s.items()}, 'state_dict': {k: v * 0 for k, v in s.items()}},
    'a name under model': lambda s: {'model': 'smallcnn', 'state_dict': s},
    'no averaged weights yet': lambda s: {'ema_state_dict': None, 'state_dict': s},
    'nested': lambda s: {'model': {'state_dict': s}},
    **{prefix: lambda s, prefix=prefix: {f'{prefix}{k}': v for k, v in s.items()} for prefix in (
        'module.', 'model.', '_orig_mod.', 'module.0.', 'module._orig_mod.',
        '_orig_mod.module.model.', 'model.module.0._orig_mod.')},
    'half precision': lambda s: {k: v.half() for k, v in s.items()},
    'Namespace': lambda s: {'state_dict': s, 'args': argparse.Namespace(epsilon=0.1, lrs=[1, 2])},
    'NumPy': lambda s: {'net': s, 'acc': np.float64(0.9), 'n': np.int64(3), 'f': np.float32(1),
                        'b': np.bool_(True), 'accs': np.arange(3.0)},
}


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('wrap', WRAPS)
def test_wrapped_weights(wrap, zipped, trained, tmp_path):
    torch.save(WRAPS[wrap](trained.state_dict()), tmp_path / 'a.pt',
               _use_new_zipfile_serialization=zipped)
    loaded = models.load_model(tmp_path / 'a.pt').state_dict()
    for k, v in trained.state_dict().items():
        expected = v.half().float() if wrap == 'half precision' else v
        assert torch.equal(loaded[k], expected)


def test_the_dead_sub_block_of_trades_is_left_out(tmp_path):
    state = models.build_model('wideresnet10-1').state_dict()
    state |= {f'sub_{k}': v for k, v in state.items() if k.startswith('block1')}
    torch.save({f'module.{k}': v for k, v in state.items()}, tmp_path / 'a.pt')
    assert isinstance(models.load_model(tmp_path / 'a.pt'), models.WideResNet)


def test_normalization_is_inside_the_network(trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / 'a.pt')
    x = torch.rand(3, 1, 28, 28)
    loaded = models.load_model(tmp_path / 'a.pt', normalize='0.25/0.5')
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), trained((x - 0.25) / 0.5))
    assert list(loaded.state_dict()) == list(trained.state_dict())
    wide = models.build_model('wideresnet10-1').eval()
    torch.save(wide.state_dict(), tmp_path / 'b.pt')
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in models.NORMALIZATIONS['cifar10'])
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(models.load_model(tmp_path / 'b.pt', normalize='cifar10')(x),
                                   wide((x - mean) / std))
    for wrong in ('0.5', '0.5/0', '0.5/nan', 'inf/1', '1,2/1', 'imagenet'):
        with pytest.raises(ValueError, match='normalize'):
            models.load_model(tmp_path / 'b.pt', normalize=wrong)


def test_a_mismatch_names_what_is_missing_and_unexpected(trained, tmp_path):
    state = trained.state_dict()
    del state['classifier.fc2.bias']
    state['classifier.extra'] = torch.zeros(1)
    torch.save(state, tmp_path / 'a.pt')
    names = 'missing classifier.fc2.bias; unexpected classifier.extra'
    with pytest.raises(ValueError, match=names):
        models.load_model(tmp_path / 'a.pt')
    state = trained.state_dict()
    state['classifier.fc1.weight'] = torch.zeros(200, 7)
    torch.save(state, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match='classifier.fc1.weight has shape .200, 7.'):
        models.load_model(tmp_path / 'a.pt')
    torch.save({'foo': torch.zeros(1)}, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match='no known network'):
        models.load_model(tmp_path / 'a.pt')
    with pytest.raises(ValueError, match='missing conv1.weight.* unexpected foo'):
        models.load_model(tmp_path / 'a.pt', arch='resnet18')
    state = trained.state_dict() | {'classifier.fc3.bias': torch.full((10,), math.nan)}
    torch.save(state, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match='fc3.bias is not finite'):
        models.load_model(tmp_path / 'a.pt')


def pickled(protocol):
    return pickle.dumps({'x': Evil()}, protocol=protocol)


def saved(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def flipped(content):
    middle = len(content) // 2
    wrong = bytes(255 - b for b in content[middle:middle + 50])
    return content[:middle] + wrong + content[middle + 50:]


WEIGHTS = {'w': torch.zeros(3000)}
UNREADABLE = {
    'empty': (lambda: b'', 'not a checkpoint'),
    'text': (lambda: b'hello\nworld\n', 'not a checkpoint'),
    'a page': (lambda: b'<!DOCTYPE html><html></html>', 'not a checkpoint'),
    'a pointer': (lambda: b'version https://git-lfs.github.com/spec/v1\n', 'not a checkpoint'),
    **{f'zip cut at {at}': (lambda at=at: saved(WEIGHTS)[:at], 'cut off')
       for at in (10, 500, 9000, -1)},
    **{f'legacy cut at {at}': (lambda at=at: saved(WEIGHTS, False)[:at], 'cut off')
       for at in (20, 200, 9000, -1)},
    'damaged': (lambda: flipped(saved(WEIGHTS)), 'damaged'),
    'code': (lambda: saved({'w': WEIGHTS, 'x': Evil()}), r'refused.*system'),
    'code, legacy': (lambda: saved({'w': WEIGHTS, 'x': Evil()}, False), r'refused.*system'),
    'code, pickle 2': (lambda: pickled(2), r'refused.*system'),
    'code, pickle 5': (lambda: pickled(5), 'refused'),
    'a module': (lambda: saved(nn.Linear(2, 2)), r'refused.*Linear'),
    'a list': (lambda: saved([1, 2]), 'no state_dict'),
    'a tensor': (lambda: saved(torch.zeros(3)), 'no state_dict'),
    'nothing': (lambda: saved({}), 'no state_dict'),
    'only a counter': (lambda: saved({'n_averaged': torch.tensor(1)}), 'no state_dict'),
    'no names': (lambda: saved({1: torch.zeros(3)}), 'no state_dict'),
}


@pytest.mark.parametrize('case', UNREADABLE)
def test_files_that_are_no_checkpoint(case, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    content, reason = UNREADABLE[case]
    (tmp_path / 'a.pt').write_bytes(content())
    with pytest.raises(ValueError, match=f'^a.pt: .*{reason}') as caught:
        models.load_model('a.pt')
    assert '\n' not in str(caught.value) and not (tmp_path / 'ran').exists() and not recwarn.list


def batch_norm(name):
    return [f'{name}.{k}' for k in ('weight', 'bias', 'running_mean', 'running_var',
                                    'num_batches_tracked')]


def test_names_and_shapes_are_robustbenchs():
    """RobustBench's PreActResNet(PreActBlockV2, bn_before_fc=True) and WideResNet, name by name."""
    state = models.build_model('preactresnet18').state_dict()
    names = ['conv1.weight', *batch_norm('bn'), 'linear.weight', 'linear.bias']
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            at = f'layer{layer}.{block}'
            names += [*batch_norm(f'{at}.bn1'), *batch_norm(f'{at}.bn2'), f'{at}.conv1.weight',
                      f'{at}.conv2.weight']
        names += [f'layer{layer}.0.shortcut.0.weight'] if layer > 1 else []
    assert sorted(state) == sorted(names)
    shapes = {'conv1.weight': (64, 3, 3, 3), 'layer1.0.conv1.weight': (64, 64, 3, 3),
              'layer2.0.bn1.weight': (64,), 'layer2.0.conv1.weight': (128, 64, 3, 3),
              'layer3.0.shortcut.0.weight': (256, 128, 1, 1),
              'layer4.1.conv2.weight': (512, 512, 3, 3),
              'bn.running_var': (512,), 'linear.weight': (10, 512), 'linear.bias': (10,)}
    assert {k: tuple(state[k].shape) for k in shapes} == shapes

    state = models.build_model('wideresnet28-10').state_dict()
    names = ['conv1.weight', *batch_norm('bn1'), 'fc.weight', 'fc.bias']
    for group in (1, 2, 3):
        for i in range(4):
            at = f'block{group}.layer.{i}'
            names += [*batch_norm(f'{at}.bn1'), *batch_norm(f'{at}.bn2'), f'{at}.conv1.weight',
                      f'{at}.conv2.weight']
        names.append(f'block{group}.layer.0.convShortcut.weight')
    assert sorted(state) == sorted(names)
    shapes = {'conv1.weight': (16, 3, 3, 3), 'block1.layer.0.conv1.weight': (160, 16, 3, 3),
              'block1.layer.0.convShortcut.weight': (160, 16, 1, 1),
              'block2.layer.0.bn1.weight': (160,), 'block2.layer.3.conv2.weight': (320, 320, 3, 3),
              'block3.layer.0.convShortcut.weight': (640, 320, 1, 1), 'bn1.running_mean': (640,),
              'fc.weight': (10, 640), 'fc.bias': (10,)}
    assert {k: tuple(state[k].shape) for k in shapes} == shapes


def test_logits_are_robustbenchs_forward_pass():
    """Their forward passes, written out on this project's weights."""
    torch.manual_seed(1)
    x = torch.rand(2, 3, 32, 32)

    def bn(v, s, name):
        return F.relu(F.batch_norm(v, s[f'{name}.running_mean'], s[f'{name}.running_var'],
                                   s[f'{name}.weight'], s[f'{name}.bias']))

    def block(v, s, at, stride, shortcut):
        out = bn(v, s, f'{at}.bn1')
        short = F.conv2d(out, s[shortcut], stride=stride) if shortcut in s else v
        out = F.conv2d(out, s[f'{at}.conv1.weight'], stride=stride, padding=1)
        return F.conv2d(bn(out, s, f'{at}.bn2'), s[f'{at}.conv2.weight'], padding=1) + short

    for arch in ('preactresnet18', 'wideresnet16-2'):
        model = models.build_model(arch).eval()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.uniform_(-0.1, 0.1), m.running_var.uniform_(0.5, 2)
                nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.uniform_(m.bias, -0.2, 0.2)
        s = model.state_dict()
        out = F.conv2d(x, s['conv1.weight'], padding=1)
        if arch == 'preactresnet18':
            for layer in (1, 2, 3, 4):
                for i in (0, 1):
                    at = f'layer{layer}.{i}'
                    stride = 2 if layer > 1 and i == 0 else 1
                    out = block(out, s, at, stride, f'{at}.shortcut.0.weight')
            out = F.avg_pool2d(bn(out, s, 'bn'), 4).flatten(1)
            expected = F.linear(out, s['linear.weight'], s['linear.bias'])
        else:
            for group in (1, 2, 3):
                for i in (0, 1):
                    at = f'block{group}.layer.{i}'
                    stride = 2 if group > 1 and i == 0 else 1
                    out = block(out, s, at, stride, f'{at}.convShortcut.weight')
            out = F.avg_pool2d(bn(out, s, 'bn1'), 8).flatten(1)
            expected = F.linear(out, s['fc.weight'], s['fc.bias'])
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- the README

README = (ROOT / 'README.md').read_text()
COMMANDS = [
    line
    for line in re.findall(r'(?:^|&& |`)((?:python|torchrun) [^`\n]*)', README, re.M)
    if '.py' in line
]


def test_the_readme_has_the_commands_that_matter():
    assert len(COMMANDS) > 35
    assert 'pip install -r requirements.txt && python -m pytest -q' in README
    assert (
        'pip install -r requirements.txt && python train_trades.py --dataset digits '
        '--entropy-weight --beta 5.5'
        in README
    )
    assert (
        'pip install -q -r requirements.txt && python -m pytest -q'
        in (ROOT / '.ci' / 'run').read_text()
    )


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_in_the_readme_parses(command, monkeypatch):
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word.endswith('.py'))
    args = words[words.index(script) + 1 :]
    assert (ROOT / script).exists() and set(words[1 : words.index(script)]) <= {
        '--nproc-per-node=8'
    }
    monkeypatch.setattr(
        models, 'read_run', lambda directory, algorithm: {'args': vars(parse([])[0])}
    )
    parse = importlib.import_module(script[:-3]).parse_args
    if args == ['--help']:
        with pytest.raises(SystemExit, match='0'):
            parse(args)
        return
    args, _ = parse(args)
    if script != 'evaluate.py':
        assert args.epsilon == evaluate.DATASETS[args.dataset]['epsilon']


def test_the_readme_reads_a_pickle_of_arrays_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r'```python\n(import pickle.*?)```', README, re.S)
    images, labels = (
        np.random.randint(256, size=(20, 32, 32, 3), dtype=np.uint8),
        np.arange(20) % 10,
    )
    for protocol in range(2, 6):
        with open('ti_500K_pseudo_labeled.pickle', 'wb') as f:
            pickle.dump({'data': images, 'extrapolated_targets': labels}, f, protocol)
        exec(snippet, {})
        found, found_labels = evaluate.load_extra('ti_500k.npz', 'cifar10', torch.device('cpu'))
        assert (found.numpy() == images).all() and (found_labels.numpy() == labels).all()

    class Malicious:
        def __reduce__(self):
            return os.system, ('touch ran',)

    with open('ti_500K_pseudo_labeled.pickle', 'wb') as f:
        pickle.dump({'data': Malicious()}, f)
    with pytest.raises(pickle.UnpicklingError, match='system'):
        exec(snippet, {})
    assert not (tmp_path / 'ran').exists()
