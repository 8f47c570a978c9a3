"""Networks for L-infinity adversarial training, and their weights.

    build_model('preactresnet18', num_classes=10)   a new network
    load_model('best.pt')                           a trained one: this project's file or anyone's

All networks take images in [0, 1] and return logits. Parameter names are those of the official
TRADES, MART, GAIRAT and AWP repositories and of RobustBench, so weights travel both ways.
"""
import argparse
import contextlib
import copy
import math
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

ARCHS = ('preactresnet18', 'resnet18', 'wideresnet28-10', 'wideresnet34-10', 'smallcnn')
NORMALIZATIONS = {'cifar10': ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
                  'cifar100': ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}


class Network(nn.Module):
    """What all networks share: features(x) are the penultimate features (B, D), forward(x) the
    logits (B, K).

    With `amp = True` the network alone runs in bfloat16; its logits are float32 again, so softmax,
    entropy and losses are. The autocast context is opened anew in each forward: its cache of
    bfloat16 weights would hide weights that changed in between.
    """
    amp = False
    num_classes = in_channels = None  # build_model says
    dataset = None  # that a checkpoint was trained on, where load_model found it in the file

    def forward(self, x):
        if not self.amp:
            return self.classify(self.features(x))
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.classify(self.features(x)).float()

    def features(self, x):
        """Penultimate features (B, D) of images x (B, C, H, W) in [0, 1]."""
        if hasattr(self, 'mean'):
            x = (x - self.mean) / self.std
        return self.embed(x)

    def set_normalization(self, mean, std):
        """Put (x - mean) / std into the network, but not into its state_dict.

        mean, std: lists of one number or of one for each channel; ValueError for others.
        """
        finite = all(map(math.isfinite, [*mean, *std])) and min(std) > 0
        if not finite or not {len(mean), len(std)} <= {1, self.in_channels}:
            raise ValueError(f'normalization by mean {mean} and std {std}: not finite, std not '
                             f'above 0, or not of {self.in_channels}-channel images')
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)


def conv3x3(in_planes, planes, stride=1):
    return nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_planes, planes, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            conv = nn.Conv2d(in_planes, planes, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(planes))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class PreActBlock(nn.Module):
    """Its shortcut convolution takes the activated input, as in RobustBench's PreActBlockV2."""

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_planes), conv3x3(in_planes, planes, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv3x3(planes, planes)
        self.shortcut = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class WideBlock(nn.Module):
    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_planes), conv3x3(in_planes, planes, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv3x3(planes, planes)
        self.convShortcut = None
        if in_planes != planes:
            self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


def stack(block, in_planes, planes, num_blocks, stride):
    first = block(in_planes, planes, stride)
    return nn.Sequential(first, *(block(planes, planes, 1) for _ in range(num_blocks - 1)))


class ResNet18(Network):
    def __init__(self, num_classes=10, in_channels=3):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, 64), nn.BatchNorm2d(64)
        self.layer1 = stack(BasicBlock, 64, 64, 2, 1)
        self.layer2 = stack(BasicBlock, 64, 128, 2, 2)
        self.layer3 = stack(BasicBlock, 128, 256, 2, 2)
        self.layer4 = stack(BasicBlock, 256, 512, 2, 2)
        self.linear = nn.Linear(512, num_classes)

    def embed(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(out)))).mean((2, 3))

    def classify(self, features):
        return self.linear(features)


class PreActResNet18(Network):
    """final_bn=False leaves out the BN and ReLU before pooling, as early repositories do."""

    def __init__(self, num_classes=10, in_channels=3, final_bn=True):
        super().__init__()
        self.conv1 = conv3x3(in_channels, 64)
        self.layer1 = stack(PreActBlock, 64, 64, 2, 1)
        self.layer2 = stack(PreActBlock, 64, 128, 2, 2)
        self.layer3 = stack(PreActBlock, 128, 256, 2, 2)
        self.layer4 = stack(PreActBlock, 256, 512, 2, 2)
        self.bn = nn.BatchNorm2d(512) if final_bn else None
        self.linear = nn.Linear(512, num_classes)

    def embed(self, x):
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return (F.relu(self.bn(out)) if self.bn is not None else out).mean((2, 3))

    def classify(self, features):
        return self.linear(features)


class WideResNet(Network):
    def __init__(self, depth=34, widen_factor=10, num_classes=10, in_channels=3):
        super().__init__()
        n, planes = (depth - 4) // 6, [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = conv3x3(in_channels, 16)
        for i in (1, 2, 3):
            block = nn.Module()  # the official names have a level more: block1.layer.0.conv1
            block.layer = stack(WideBlock, planes[i - 1], planes[i], n, 1 if i == 1 else 2)
            self.add_module(f'block{i}', block)
        self.bn1, self.fc = nn.BatchNorm2d(planes[3]), nn.Linear(planes[3], num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
        nn.init.zeros_(self.fc.bias)

    def embed(self, x):
        out = self.block3.layer(self.block2.layer(self.block1.layer(self.conv1(x))))
        return F.relu(self.bn1(out)).mean((2, 3))

    def classify(self, features):
        return self.fc(features)


class SmallCNN(Network):
    """The MNIST network of TRADES, for 28 x 28 images.

    Its own initialisation is part of it: with torch's default it stays at chance for long.
    """

    def __init__(self, num_classes=10, in_channels=1, dropout=0.5):
        super().__init__()
        relu = nn.ReLU
        self.feature_extractor = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(in_channels, 32, 3), relu1=relu(),
            conv2=nn.Conv2d(32, 32, 3), relu2=relu(), maxpool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 64, 3), relu3=relu(),
            conv4=nn.Conv2d(64, 64, 3), relu4=relu(), maxpool2=nn.MaxPool2d(2)))
        self.classifier = nn.Sequential(OrderedDict(
            fc1=nn.Linear(64 * 4 * 4, 200), relu1=relu(), drop=nn.Dropout(dropout),
            fc2=nn.Linear(200, 200), relu2=relu(), fc3=nn.Linear(200, num_classes)))
        for m in self.feature_extractor:
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.zeros_(self.classifier.fc3.weight)
        nn.init.zeros_(self.classifier.fc3.bias)

    def embed(self, x):
        return self.classifier[:-1](self.feature_extractor(x).flatten(1))

    def classify(self, features):
        return self.classifier.fc3(features)


def build_model(arch, num_classes=10, in_channels=None, final_bn=True, init_from=None):
    """A new Network. arch: one of ARCHS, or wideresnet<depth>-<width> in general.

    in_channels: 1 or 3; default 1 for smallcnn, else 3. init_from: a file for load_model, whose
    weights it starts from. Raises ValueError for an unknown arch, and what load_model raises.
    """
    if init_from:
        model = load_model(init_from, arch, num_classes)
        if hasattr(model, 'mean'):
            raise ValueError(f'{init_from}: holds a normalization, which no run keeps')
        if model.in_channels != in_channels:
            raise ValueError(f'{init_from}: takes {model.in_channels}-channel images, '
                             f'not {in_channels}')
        return model.train()
    in_channels = in_channels or (1 if arch == 'smallcnn' else 3)
    wide = re.fullmatch(r'wideresnet(\d+)-(\d+)', arch)
    if arch == 'preactresnet18':
        model = PreActResNet18(num_classes, in_channels, final_bn)
    elif arch == 'resnet18':
        model = ResNet18(num_classes, in_channels)
    elif arch == 'smallcnn':
        model = SmallCNN(num_classes, in_channels)
    elif wide and int(wide[1]) >= 10 and int(wide[1]) % 6 == 4 and int(wide[2]) > 0:
        model = WideResNet(int(wide[1]), int(wide[2]), num_classes, in_channels)
    else:
        raise ValueError(f"unknown arch '{arch}' (choose from {', '.join(ARCHS)})")
    model.num_classes, model.in_channels = num_classes, in_channels
    return model


# ---------------------------------------------------------------- files of weights

@contextlib.contextmanager
def replacing(path, mode='wb', **options):
    """A file that takes the place of path when it is whole; a crash at any moment leaves the old
    one or the new one."""
    partial = f'{path}.tmp'
    try:
        if 'b' not in mode:
            options['encoding'] = 'utf-8'
        with open(partial, mode, **options) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def save_checkpoint(content, path):
    """Write the dict content; a crash at any moment leaves the old file or the new one, whole."""
    with replacing(path) as f:
        torch.save(content, f)


class StandIn:
    """What stands for an object that somebody saved beside the weights: nothing of it is built."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass


# What has no business beside weights: a file that names it is refused
SUSPICIOUS = {'os', 'posix', 'nt', 'sys', 'subprocess', 'importlib', 'runpy', 'shutil', 'socket',
              'pty', 'pickle', 'code', 'ctypes', 'webbrowser', 'eval', 'exec', 'compile', 'open',
              'getattr', 'setattr', '__import__', 'breakpoint'}


def read_checkpoint(path):
    """The content of a file by torch.save, on the CPU, without running code that it may hold.

    Objects that are no tensors and no plain containers are stood in for: their classes are not even
    looked up. Raises FileNotFoundError, or ValueError with one line that names the file: not a
    checkpoint, cut off or damaged, or a pickle that asks for what is SUSPICIOUS.
    """
    try:
        with open(path, 'rb') as f:
            head = f.read(16)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file') from None
    except OSError as error:
        raise ValueError(f'{path}: cannot be read ({error.strerror})') from None
    stand_ins = {}
    while True:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins.values()):
                warnings.simplefilter('ignore')  # on unusual pickle protocols
                content = torch.load(path, map_location='cpu', weights_only=True)
            # torch.load does not look at the checksums that torch.save writes
            if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
                raise zipfile.BadZipFile(damaged)
            return content
        except Exception as error:  # a parser of arbitrary bytes raises whatever it stumbles on
            found = re.search(r"GLOBAL ([\w.]+)|[Cc]lass '?([\w.]+)", str(error))
            code = found and (found[1] or found[2])
            # how torch.save's files begin, the new and the old format
            well = head.startswith((b'PK\3\4', b'\x80\2\x8a\nl\xfc\x9cF\xf9'))
            if isinstance(error, pickle.UnpicklingError) and code:
                module, _, name = code.rpartition('.')
                if well and code.split('.')[0] not in SUSPICIOUS and code not in stand_ins:
                    where = {'__module__': module or 'builtins'}
                    stand_ins[code] = type(name, (StandIn,), where)
                    continue
                reason = (f'refused, its pickle would run code ({code}); if you trust it, save its '
                          'weights alone: torch.save(torch.load(FILE, weights_only=False)'
                          "['state_dict'], NEW_FILE)")
            elif well and (isinstance(error, zipfile.BadZipFile) or not zipfile.is_zipfile(path)):
                reason = 'cut off or damaged'
            elif head[:1] == b'\x80' and not well:
                reason = 'refused, a pickle that torch.load does not read with weights_only=True'
            else:
                reason = 'not a checkpoint'
            raise ValueError(f'{path}: {reason}') from None


def find_state_dict(content):
    """The weights in a checkpoint, {name: tensor}, without prefixes; ValueError if none."""
    keys = ('ema_state_dict', 'state_dict', 'model_state_dict', 'net', 'model')
    state = content
    while isinstance(state, dict):
        if state and all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
            break
        state = next((state[k] for k in keys if isinstance(state.get(k), dict)), None)
    # n_averaged: a count of torch's AveragedModel; sub_block1: unused, in TRADES' WideResNet
    if not isinstance(state, dict) or not state.keys() - {'n_averaged'}:
        raise ValueError(f'holds no state_dict, but {describe(content)}; weights are read that '
                         'were saved by torch.save(model.state_dict(), FILE)')
    state = {k: v for k, v in state.items() if k != 'n_averaged'}
    prefixes = ('module.0.', 'module.', 'model.', '_orig_mod.')
    while prefix := next((p for p in prefixes if all(k.startswith(p) for k in state)), None):
        state = {k[len(prefix):]: v for k, v in state.items()}
    return {k: v for k, v in state.items() if not k.startswith('sub_block1.')}


def describe(content):
    """What a file holds, in a few words."""
    if isinstance(content, dict) and content:
        return 'a dict of ' + ', '.join(f'{k} ({type(v).__name__})'
                                        for k, v in list(content.items())[:4])
    if isinstance(content, (dict, list, tuple)):
        kinds = sorted({type(v).__name__ for v in content})
        return f'a {type(content).__name__} of {len(content)} {" and ".join(kinds)}'.rstrip()
    kind = type(content)
    return f'a whole {kind.__module__}.{kind.__name__}' if isinstance(content, StandIn) else (
        f'a {kind.__name__}')


def without_prefix(state):
    """A state_dict whose names all begin alike, as those in a Sequential do, without that."""
    begin = os.path.commonprefix([f'{k}.' for k in state]).rpartition('.')[0]
    return {k[len(begin) + 1:]: v for k, v in state.items()} if begin else state


def take_normalization(state):
    """(mean, std) that a state_dict itself holds, removed from it, as of a model with a layer that
    normalizes; None without."""
    for mean, std in (('mean', 'std'), ('mu', 'sigma')):
        for name in list(state):
            at, _, last = name.rpartition('.')
            partner = f'{at}.{std}'.lstrip('.')
            if last == mean and partner in state and state[name].numel() in (1, 3):
                values = state.pop(name), state.pop(partner)
                return tuple(v.flatten().tolist() for v in values)
    return None


def infer_arch(state):
    """(arch, num_classes, in_channels, final_bn) of a state_dict; ValueError if unknown."""
    def known(*names):
        return next((name for name in names if name in state), None)
    head = known('linear.weight', 'fc.weight', 'classifier.fc3.weight')
    first = known('conv1.weight', 'feature_extractor.conv1.weight')
    blocks = [k for k in state if re.fullmatch(r'block1\.layer\.\d+\.conv1\.weight', k)]
    layers = [len([k for k in state if re.fullmatch(rf'layer{i}\.\d+\.conv1\.weight', k)])
              for i in (1, 2, 3, 4)]
    fits = head and first and (state[head].ndim, state[first].ndim) == (2, 4)
    if fits and blocks:
        arch = f'wideresnet{6 * len(blocks) + 4}-{state[blocks[0]].shape[0] // 16}'
    elif fits and head == 'classifier.fc3.weight':
        arch = 'smallcnn'
    elif fits and layers == [2, 2, 2, 2] and state[first].shape[0] == 64:
        arch = 'resnet18' if 'bn1.weight' in state else 'preactresnet18'
    else:
        what = f'a ResNet of {layers} blocks, ' if fits and any(layers) else ''
        raise ValueError(f"{what}names of no known network ({', '.join(sorted(state)[:3])}, ...); "
                         f'known are {", ".join(ARCHS)} and wideresnet<depth>-<width>')
    return arch, state[head].shape[0], state[first].shape[1], 'bn.weight' in state


def parse_normalization(text):
    """'none', 'cifar10', 'cifar100' or 'MEAN/STD' -> None or (mean, std).

    MEAN and STD: one number, or three by commas. Raises ValueError.
    """
    if text in (None, 'none'):
        return None
    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    try:
        mean, std = ([float(v) for v in part.split(',')] for part in text.split('/'))
        return mean, std
    except ValueError:
        raise ValueError(f"normalize '{text}' is not none, cifar10, cifar100 or MEAN/STD such as "
                         '0.5,0.5,0.5/0.25,0.25,0.25') from None


def load_model(path, arch=None, num_classes=None, normalize=None, device='cpu'):
    """A trained Network in eval mode, from this project's checkpoints or anyone's.

    path: a bare state_dict, or one under 'ema_state_dict', 'state_dict', 'model_state_dict', 'net'
    or 'model', with the prefixes module., model., _orig_mod. and module.0. in any nesting. arch,
    num_classes: checked against the file, and read off the shapes where None. normalize: see
    parse_normalization. Loading is strict.
    Its attribute `dataset` is what the file says under that name, or None.
    Raises FileNotFoundError or ValueError with one line that names the file.
    """
    normalize = parse_normalization(normalize)
    content = read_checkpoint(path)
    try:
        state = find_state_dict(content)
        inside = take_normalization(state)
        if inside:
            if normalize:
                raise ValueError('has a normalization of its own, beside --normalize')
            normalize, state = inside, find_state_dict(without_prefix(state))
        try:
            found_arch, classes, in_channels, final_bn = infer_arch(state)
        except ValueError:
            if arch is None:
                raise
            found_arch, classes, in_channels, final_bn = arch, num_classes or 10, None, True
        if num_classes is not None and num_classes != classes:
            raise ValueError(f'has {classes} classes, not {num_classes}')
        model = build_model(arch or found_arch, classes, in_channels, final_bn)
        expected = model.state_dict()
        for k in expected:  # a counter that nothing reads; old files lack it
            if k.endswith('.num_batches_tracked'):
                state.setdefault(k, expected[k])
        missing = [k for k in expected if k not in state]
        unexpected = [k for k in state if k not in expected]
        if missing or unexpected:
            raise ValueError(f'does not fit {arch or found_arch}: '
                             f'missing {", ".join(missing[:3]) or "nothing"}; '
                             f'unexpected {", ".join(unexpected[:3]) or "nothing"}')
        odd = next((k for k in expected if expected[k].shape != state[k].shape), None)
        if odd:
            raise ValueError(f'does not fit {arch or found_arch}: {odd} has shape '
                             f'{tuple(state[odd].shape)}, not {tuple(expected[odd].shape)}')
        model.load_state_dict(state)
        odd = next((k for k, v in model.state_dict().items() if not v.isfinite().all()), None)
        if odd:
            raise ValueError(f'{odd} is not finite: the training that wrote it diverged')
        if normalize:
            model.set_normalization(*normalize)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f'{path}: {error}') from None
    model.dataset = content.get('dataset') if isinstance(content.get('dataset'), str) else None
    return model.to(device).eval()


# ---------------------------------------------------------------- weights that move

def perturb_weights(model, gamma):
    """Adversarial weight perturbation (Wu et al., 2020): w += gamma ||w|| / ||g|| g, g = w.grad.

    Moves the weights of convolutions and linear layers; returns what restore_weights takes back.
    The official proxy network amounts to this: its learning rate cancels in the normalisation.
    """
    kept = [(m.weight, m.weight.detach().clone()) for m in model.modules()
            if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for w, _ in kept:
            w += gamma * w.norm() / (w.grad.norm() + 1e-12) * w.grad
    return kept


def restore_weights(kept):
    """Undo perturb_weights, exactly."""
    with torch.no_grad():
        for w, before in kept:
            w.copy_(before)


@contextlib.contextmanager
def frozen_statistics(model, frozen=True):
    """Leave the running statistics of batch normalization alone meanwhile, if frozen."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in layers:
        m.track_running_stats = not frozen
    try:
        yield
    finally:
        for m in layers:
            m.track_running_stats = True


def copy_of(model):
    """A copy with weights of its own, of the same --amp and never compiled."""
    copied = copy.deepcopy(model)
    vars(copied).pop('forward', None)  # accelerate's, compiled, runs the model itself
    return copied


def average(ema, model, decay):
    """Move ema, a copy_of(model), to decay * ema + (1 - decay) * model; BN buffers are the model's.

    The host does not wait for the device in it, as it would in torch's AveragedModel.
    """
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)
    for ours, latest in zip(ema.buffers(), model.buffers()):
        ours.copy_(latest)


def add_speed_args(parser):
    """The flags that accelerate takes."""
    add = parser.add_argument_group('speed').add_argument
    add('--amp', action=argparse.BooleanOptionalAction,
        help='the network in bfloat16, all else in float32 (default: where CUDA has it)')
    add('--tf32', action='store_true', help='TensorFloat-32 for what is float32')
    add('--compile', nargs='?', const='default', metavar='MODE',
        choices=('default', 'reduce-overhead', 'max-autotune'),
        help='torch.compile the network: default, reduce-overhead or max-autotune (default: off)')


def has_bfloat16(device):
    """Whether the device computes in bfloat16, and does not emulate it."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(False)
    x86 = torch.backends.cpu.get_cpu_capability().startswith(('DEFAULT', 'AVX'))
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def accelerate(model, args, world=1):
    """Let a Network run as --amp, --tf32 and --compile of args say; its names stay as they are.

    --amp None means, and becomes: whether the network is on a CUDA device that has bfloat16.
    Compiled are the batch sizes of training and evaluation; any other, such as the last of an
    epoch, runs as it is, since each would be compiled anew.
    """
    device = next(model.parameters()).device
    if args.amp is None:
        args.amp = device.type == 'cuda' and has_bfloat16(device)
    model.amp = args.amp
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = True  # the fastest convolutions for the shapes that recur
    if args.compile:
        share = args.batch_size / world
        sizes = math.floor(share), math.ceil(share), args.test_batch_size
        eager = model.forward
        try:
            torch.compile(torch.square, mode=args.compile, dynamic=False)(torch.ones(2).to(device))
        except Exception as error:  # of whatever compiler is missing
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f'--compile does not work here: {reason}') from None
        compiled = torch.compile(eager, mode=args.compile, dynamic=False)
        # clone: a CUDA graph's output is overwritten by its next run
        model.forward = lambda x: compiled(x).clone() if len(x) in sizes else eager(x)
