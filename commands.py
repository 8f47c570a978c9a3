"""What each command needs beside its own work: types of flags, ends with one line, devices,
several processes, seeds."""
import argparse
import atexit
import contextlib
import fcntl
import math
import os
import platform
import sys

import numpy as np
import torch


# ---------------------------------------------------------------- flags

class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default where there is one and the help does not speak of it."""

    def _get_help_string(self, action):
        told, value = action.help or '', action.default
        if value in (None, False, argparse.SUPPRESS) or 'default' in told:
            return told
        shown = ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value
        return f'{told} (default: {shown})'.replace('%', '%%').lstrip()


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a user's mistake is one line on stderr (and exit status 2, as ever)."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {" ".join(str(message).split())}\n')

    def refuse_idle(self, argv, rules):
        """End with a line where argv gives a flag that has no effect.

        rules: {flag: (whether it has an effect, when it has none)}.
        """
        given = {word.partition('=')[0] for word in (sys.argv[1:] if argv is None else argv)}
        for flag, (effective, when) in rules.items():
            if flag in given and not effective:
                self.error(f'{flag} has no effect {when}')


def real(interval, hint=''):
    """The type of a flag that is a number, as in '0.031', '8/255' or 'inf'.

    interval: what it may be, as in '(0, 1]'; hint: for the message where it is not.
    """
    low, high = map(float, interval[1:-1].split(','))

    def convert(text):
        numerator, slash, denominator = text.partition('/')
        try:
            value = float(numerator) / (float(denominator) if slash else 1)
        except (ValueError, ZeroDivisionError):
            value = math.nan
        inside = low < value < high or (value == low and interval[0] == '['
                                        or value == high and interval[-1] == ']')
        if not inside:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number in {interval}{hint}")
        return value
    return convert


pixels = real('(0, 1]', '; pixels are in [0, 1]: write 8/255')  # a length in them


def whole(minimum, maximum=2 ** 63 - 1):
    """The type of a flag that is a whole number."""
    def convert(text):
        if not text.isdecimal() or len(text) > 20 or not minimum <= int(text) <= maximum:
            limit = f' to {maximum}' if maximum < 2 ** 63 - 1 else ''
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a whole number from {minimum}{limit}")
        return int(text)
    return convert


# ---------------------------------------------------------------- what it says, and its end

class Stop(Exception):
    """Stop(line, status): the end of a command that is not success, with a line for stderr or None,
    and the exit status."""


@contextlib.contextmanager
def mistakes():
    """Around what can fail by the user's mistake alone: one line, exit status 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise Stop(f'error: {" ".join(str(error).split())}', 2) from error


@contextlib.contextmanager
def exit_status():
    """Around a script's main: each end that is not success is one line on stderr and a status."""
    try:
        yield
        return
    except Stop as stop:
        line, status = stop.args
    except torch.OutOfMemoryError:
        line, status = 'out of GPU memory: a smaller --batch-size needs less', 1
    except KeyboardInterrupt:
        line, status = 'interrupted', 130
    if line:
        say(f'{os.path.basename(sys.argv[0])}: {line}', sys.stderr)
    sys.exit(status)


def say(text, stream=None):
    """Print a text, with ? for what the stream cannot show.

    Where it cannot be written (full disk, nobody reads), nothing is said from then on.
    """
    stream = stream or sys.stdout
    encoding = stream.encoding or 'utf-8'
    try:
        print(text.encode(encoding, 'replace').decode(encoding), file=stream, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(text, stream=None):
    """say(), of several processes by one."""
    if processes()[0] == 0:
        say(text, stream)


def lock(file, wait=True):
    """Lock an open file until it is closed; BlockingIOError if it is locked and wait is False.

    Where the file system has no locks, that is said once and no more.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if not lock.said:
            say(f'{file.name}: no locks there ({error.strerror}); see to it that no second process '
                'writes to the same place', sys.stderr)
        lock.said = True


lock.said = False


# ---------------------------------------------------------------- devices, processes, seeds

def launched():
    """(rank, number of processes) as torchrun or another launcher says; (0, 1) without one.

    Raises ValueError where a variable is not a number.
    """
    try:
        rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    except ValueError as error:
        raise ValueError(f'RANK or WORLD_SIZE in the environment: {error}') from None
    complete = {'RANK', 'MASTER_ADDR', 'MASTER_PORT'} <= os.environ.keys()
    return (rank, world) if complete else (0, 1)


def pick_device(no_cuda=False):
    """The CUDA device, of several processes each its own, or the CPU.

    It says so where CUDA_VISIBLE_DEVICES leaves no device. Raises ValueError for more processes
    than devices.
    """
    if not no_cuda and torch.cuda.is_available():
        rank, world = launched()
        index = int(os.environ.get('LOCAL_RANK', rank)) if world > 1 else 0
        if index >= torch.cuda.device_count():
            raise ValueError(f'process {index} of this machine has no CUDA device: there are '
                             f'{torch.cuda.device_count()}')
        return torch.device('cuda', index)
    if not no_cuda and os.environ.get('CUDA_VISIBLE_DEVICES') is not None:
        say("no CUDA device with CUDA_VISIBLE_DEVICES="
            f"'{os.environ['CUDA_VISIBLE_DEVICES']}': running on the CPU", sys.stderr)
    return torch.device('cpu')


def init_processes(device, timeout=None):
    """Let the processes that torchrun began know each other; (rank, number of processes).

    timeout: a timedelta, how long one may wait for another; None: torch's.
    """
    rank, world = launched()
    if world == 1 and os.environ.get('WORLD_SIZE', '1') != '1':
        say(f'WORLD_SIZE={os.environ["WORLD_SIZE"]} is set, but not RANK, MASTER_ADDR and '
            'MASTER_PORT: running as one process', sys.stderr)
    if world > 1 and not torch.distributed.is_initialized():
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        # Gloo as well, for signals and outcomes: by NCCL, the host would wait for the GPU
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        torch.distributed.init_process_group(backend, timeout=timeout)
        atexit.register(torch.distributed.destroy_process_group)
    return rank, world


def processes():
    """(rank, number of processes), as init_processes left them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def over_processes(number):
    """The highest of a whole number over all processes."""
    if processes()[1] == 1:
        return number
    number = torch.tensor(number)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return number.item()


def versions(device):
    """What a number was measured with: device and software."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        cpu = platform.processor() or platform.machine()
        name = f'{cpu} CPU, {torch.get_num_threads()} threads'
    return {'device': name, 'python': platform.python_version(), 'torch': str(torch.__version__),
            'numpy': np.__version__}


def seed_everything(*numbers):
    """Seed torch's generators with a hash of whole numbers, e.g. (seed, epoch, step).

    Such draws need no saved random state to go on from, and are the same in any process.
    """
    numbers = len(numbers), *numbers  # SeedSequence takes (1,) and (1, 0) for the same
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
