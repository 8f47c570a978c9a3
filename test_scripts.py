"""The commands, end to end: python -m pytest -q test_scripts.py"""

import copy
import csv
import importlib
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
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import models

ROOT = Path(__file__).parent
ALGORITHMS = ('at', 'trades', 'mart', 'gairat')
TINY = [
    '--dataset',
    'digits',
    '--train-size',
    '104',
    '--test-size',
    '40',
    '--epochs',
    '2',
    '--num-steps',
    '2',
    '--batch-size',
    '32',
    '--no-cuda',
]
THREADS = {'OMP_NUM_THREADS': '1'}  # small work: more threads only get in each other's way


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
    for algorithm in ALGORITHMS:
        for entropy_weight in ([], ['--entropy-weight']):
            done = run(f'train_{algorithm}.py', *TINY, *entropy_weight, cwd=root)
            name = f'digits-{"ew-" if entropy_weight else ""}{algorithm}-seed1'
            assert done.returncode == 0, done.stderr
            assert done.stderr == ''
            assert (
                len(
                    re.findall(
                        r'^epoch \d/2 .*clean .*pgd10 .*entropy .*images/s .*min left$',
                        done.stdout,
                        re.M,
                    )
                )
                == 2
            )
            found[name] = root / 'runs' / name
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
    assert (
        done.returncode == 0 and "CUDA_VISIBLE_DEVICES=''" in done.stdout and 'CPU' in done.stdout
    )


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


@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_killed_inside_an_epoch_and_resumed_is_as_if_nothing_had_been(algorithm, runs, tmp_path):
    directory = tmp_path / 'run'
    status, _ = start_and_signal(
        f'train_{algorithm}.py', [*TINY, '--entropy-weight'], directory, signal.SIGKILL
    )
    assert status == -signal.SIGKILL
    assert 0 < models.read_checkpoint(directory / 'last.pt')['step'] < 4
    with open(directory / 'log.csv', 'a') as log:
        log.write('2,0.02,1.2')  # a line cut off
    done = run(f'train_{algorithm}.py', '--resume', directory, '--log-interval', 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    uninterrupted = runs[f'digits-ew-{algorithm}-seed1']
    same_run(directory, uninterrupted)
    ours, theirs = rows_of(directory / 'log.csv'), rows_of(uninterrupted / 'log.csv')
    assert [{k: row[k] for k in row if k not in TIMING} for row in ours] == [
        {k: row[k] for k in row if k not in TIMING} for row in theirs
    ]
    assert (
        models.read_checkpoint(directory / 'best.pt')['epoch']
        == models.read_checkpoint(uninterrupted / 'best.pt')['epoch']
    )


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_leaves(number, status, runs, tmp_path):
    got, told = start_and_signal('train_at.py', TINY, tmp_path / 'run', number)
    assert got == status and f'--resume {tmp_path / "run"}' in told and told.count('\n') == 1
    assert run('train_at.py', '--resume', tmp_path / 'run', cwd=tmp_path).returncode == 0
    same_run(tmp_path / 'run', runs['digits-at-seed1'])


def test_averaged_weights_and_weight_perturbation_survive_as_well(tmp_path):
    extras = [
        *TINY,
        '--ema',
        '0.8',
        '--awp-gamma',
        '0.01',
        '--awp-warmup',
        '1',
        '--lr-schedule',
        'cosine',
    ]
    assert run('train_trades.py', *extras, '--model-dir', 'whole', cwd=tmp_path).returncode == 0
    start_and_signal('train_trades.py', extras, tmp_path / 'cut', signal.SIGKILL)
    assert run('train_trades.py', '--resume', 'cut', cwd=tmp_path).returncode == 0
    same_run(tmp_path / 'whole', tmp_path / 'cut')
    a, b = (models.read_checkpoint(tmp_path / d / 'last.pt') for d in ('whole', 'cut'))
    assert all(
        torch.equal(a['ema_state_dict'][k], b['ema_state_dict'][k]) for k in a['ema_state_dict']
    )
    assert not torch.equal(
        a['ema_state_dict']['module.classifier.fc3.weight'],
        a['state_dict']['classifier.fc3.weight'],
    )
    assert 'ema_pgd10' in a['log'][-1] and models.best_row(a['log'])['ema_pgd10'] == max(
        row['ema_pgd10'] for row in a['log']
    )
    loaded = models.load_model(
        tmp_path / 'whole' / 'last.pt'
    ).state_dict()  # the average is what counts
    assert torch.equal(
        loaded['classifier.fc3.weight'], a['ema_state_dict']['module.classifier.fc3.weight']
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
    """SIGTERM to torchrun inside an epoch; resumed, the run ends as one that was not interrupted."""
    (tmp_path / 'all.py').write_text(SEVERAL.replace("('at', 'trades', 'mart', 'gairat')", "('at',)"))
    assert torchrun('all.py', 'whole', *TINY, cwd=tmp_path).returncode == 0
    train = tmp_path / 'train.py'
    train.write_text('import torch, train_at\ntorch.nn.Dropout.forward = lambda self, x: x\ntrain_at.main()\n')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', train, *TINY]
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
    ema, by_hand = models.average_of(model, 0.9), None
    for _ in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        model.bn1.running_mean += 1
        ema.update_parameters(model)
        weights = [p.detach().double() for p in model.parameters()]
        by_hand = (
            weights if by_hand is None else [0.9 * a + 0.1 * p for a, p in zip(by_hand, weights)]
        )
    for a, p in zip(by_hand, ema.module.parameters()):
        assert torch.allclose(a.float(), p, atol=1e-5)
    assert torch.equal(ema.module.bn1.running_mean, model.bn1.running_mean)


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


def test_compiled_for_two_batch_sizes_and_no_more(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch, 'compile', lambda f, **options: lambda x: (compiled.append(len(x)), f(x))[1]
    )
    model = models.build_model('smallcnn').eval()
    names = list(model.state_dict())
    models.accelerate(model, parsed('--compile', '--test-batch-size', 9))
    for size in (32, 9, 7, 32):
        assert model(torch.rand(size, 1, 28, 28)).shape == (size, 10)
    assert compiled == [32, 9, 32] and list(model.state_dict()) == names


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
