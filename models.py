"""Networks for L-infinity adversarial training, and their weights.

    build_model('preactresnet18', num_classes=10)   a new network
    load_model('best.pt')                           a trained one: this project's file or anyone's

All networks take images in [0, 1] and return logits. Parameter names are those of the official
TRADES, MART, GAIRAT and AWP repositories and of RobustBench, so weights travel both ways.
"""
import argparse
import contextlib
import copy
import importlib.util
import inspect
import math
import os
import pickle
import re
import sys
import traceback
import warnings
import zipfile
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

ARCHS = ('preactresnet18', 'preactresnet18-raw', 'preactresnet18-swish', 'resnet18', 'resnet34',
         'resnet50', 'wideresnet28-10', 'wideresnet34-10', 'wideresnet28-10-swish', 'smallcnn')
KNOWN_ARCHS = (f'{", ".join(ARCHS)}, wideresnet<depth>-<width>[-swish] in general, or your own '
               'FILE.py:NAME or package.module:NAME')
NORMALIZATIONS = {'cifar10': ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
                  'cifar100': ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}


class Network(nn.Module):
    """What all networks have: ours, which give features (B, D) and classify them, and one's own,
    whose class this one is put before and whose forward becomes plain_forward.

    With `amp = True` the network alone runs in bfloat16; its logits are float32 again, so softmax,
    entropy and losses are. The autocast context is opened anew in each forward: its cache of
    bfloat16 weights would hide weights that changed in between.
    """
    amp = False
    own = ''  # of one's own network the source
    input_normalization = None  # (mean, std)
    num_classes = in_channels = image_size = None  # of ours; the last where it is fixed
    about = {}  # what load_model found in the file: dataset and, if ours, algorithm and args

    def forward(self, x):
        x = self.normalize_input(x)
        if not self.amp:
            return self.plain_forward(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.plain_forward(x).float()

    def plain_forward(self, x):
        return self.classify(self.features(x))

    def normalize_input(self, x):
        return (x - self.input_mean) / self.input_std if self.input_normalization else x

    def penultimate_features(self, x):
        """What the last layer takes, (B, D), of images x (B, C, H, W) in [0, 1]."""
        return self.features(self.normalize_input(x)).flatten(1)

    def set_normalization(self, mean, std):
        """Put (x - mean) / std into the network, but not into its state_dict.

        mean, std: lists of one number or of one for each channel; ValueError for others.
        """
        finite = all(map(math.isfinite, [*mean, *std])) and min(std) > 0
        if not finite or not {len(mean), len(std)} <= {1, self.in_channels or 3}:
            raise ValueError(f'normalization by mean {mean} and std {std}: not finite, std not '
                             f'above 0, or not of {self.in_channels or 3}-channel images')
        for name, values in (('input_mean', mean), ('input_std', std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.input_normalization = list(mean), list(std)


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


class Bottleneck(nn.Module):
    """From and to 4 * planes, 64 planes before the first."""

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.conv2, self.bn2 = conv3x3(planes, planes, stride), nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn1, self.bn3 = nn.BatchNorm2d(planes), nn.BatchNorm2d(4 * planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != 4 * planes:
            conv = nn.Conv2d(in_planes, 4 * planes, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * planes))

    def forward(self, x):
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """Its shortcut convolution takes the activated input, as in RobustBench's PreActBlockV2, or the
    raw input, as in its PreActBlock; the names of the weights are the same."""

    def __init__(self, in_planes, planes, stride, raw=False):
        super().__init__()
        self.raw = raw
        self.bn1, self.conv1 = nn.BatchNorm2d(in_planes), conv3x3(in_planes, planes, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv3x3(planes, planes)
        self.shortcut = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x if self.raw else out)
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


def stack(block, in_planes, planes, num_blocks, stride, expansion=1):
    first = block(in_planes, planes, stride)
    others = (block(planes * expansion, planes, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(first, *others)


RESNETS = {18: (BasicBlock, 1, (2, 2, 2, 2)), 34: (BasicBlock, 1, (3, 4, 6, 3)),
           50: (Bottleneck, 4, (3, 4, 6, 3))}  # depth: block, its expansion, blocks in each layer


class ResNet(Network):
    def __init__(self, depth=18, num_classes=10, in_channels=3):
        super().__init__()
        block, wider, blocks = RESNETS[depth]
        self.conv1, self.bn1 = conv3x3(in_channels, 64), nn.BatchNorm2d(64)
        self.layer1 = stack(block, 64, 64, blocks[0], 1, wider)
        self.layer2 = stack(block, 64 * wider, 128, blocks[1], 2, wider)
        self.layer3 = stack(block, 128 * wider, 256, blocks[2], 2, wider)
        self.layer4 = stack(block, 256 * wider, 512, blocks[3], 2, wider)
        self.linear = nn.Linear(512 * wider, num_classes)

    def features(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(out)))).mean((2, 3))

    def classify(self, features):
        return self.linear(features)


class PreActResNet18(Network):
    """final_bn=False leaves out the BN and ReLU before pooling, as early repositories do."""
    raw = False  # see PreActBlock

    def __init__(self, num_classes=10, in_channels=3, final_bn=True):
        super().__init__()
        block = partial(PreActBlock, raw=self.raw)
        self.conv1 = conv3x3(in_channels, 64)
        self.layer1 = stack(block, 64, 64, 2, 1)
        self.layer2 = stack(block, 64, 128, 2, 2)
        self.layer3 = stack(block, 128, 256, 2, 2)
        self.layer4 = stack(block, 256, 512, 2, 2)
        self.bn = nn.BatchNorm2d(512) if final_bn else None
        self.linear = nn.Linear(512, num_classes)

    def features(self, x):
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return (F.relu(self.bn(out)) if self.bn is not None else out).mean((2, 3))

    def classify(self, features):
        return self.linear(features)


class PreActResNet18Raw(PreActResNet18):
    raw = True


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

    def features(self, x):
        out = self.block3.layer(self.block2.layer(self.block1.layer(self.conv1(x))))
        return F.relu(self.bn1(out)).mean((2, 3))

    def classify(self, features):
        return self.fc(features)


def padded_as_tensorflow(conv, x):
    """conv(x) for a convolution without padding: at stride 2 right and below alone."""
    return conv(F.pad(x, (1, 1, 1, 1) if conv.stride == (1, 1) else (0, 1, 0, 1)))


class SwishBlock(nn.Module):
    """Of DeepMind's WideResNet."""

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(in_planes), nn.BatchNorm2d(planes)
        self.conv_0 = nn.Conv2d(in_planes, planes, 3, stride, bias=False)
        self.conv_1, self.shortcut = conv3x3(planes, planes), None
        if in_planes != planes:
            self.shortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x):
        out = F.silu(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = F.silu(self.batchnorm_1(padded_as_tensorflow(self.conv_0, out)))
        return self.conv_1(out) + shortcut


class PreActSwishBlock(nn.Module):
    """Of DeepMind's PreActResNet."""

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(in_planes), nn.BatchNorm2d(planes)
        self.conv_2d_1 = nn.Conv2d(in_planes, planes, 3, stride, bias=False)
        self.conv_2d_2, self.shortcut = conv3x3(planes, planes), None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Conv2d(in_planes, planes, 3, stride, bias=False)

    def forward(self, x):
        out = padded_as_tensorflow(self.conv_2d_1, F.silu(self.batchnorm_0(x)))
        shortcut = x if self.shortcut is None else padded_as_tensorflow(self.shortcut, x)
        return self.conv_2d_2(F.silu(self.batchnorm_1(out))) + shortcut


class SwishNetwork(Network):
    """DeepMind's networks (Gowal et al., 2020): SiLU, and CIFAR's mean and std part of them."""

    def __init__(self, width, num_classes, in_channels):
        super().__init__()
        self.batchnorm, self.logits = nn.BatchNorm2d(width), nn.Linear(width, num_classes)
        self.in_channels = in_channels
        if in_channels == 3:
            self.set_normalization(*NORMALIZATIONS['cifar100' if num_classes == 100 else 'cifar10'])

    def features(self, x):
        return F.silu(self.batchnorm(self.convolutions(x))).mean((2, 3))

    def classify(self, features):
        return self.logits(features)


class WideResNetSwish(SwishNetwork):
    def __init__(self, depth=28, widen_factor=10, num_classes=10, in_channels=3):
        n, planes = (depth - 4) // 6, [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        super().__init__(planes[3], num_classes, in_channels)
        self.init_conv, self.layer = conv3x3(in_channels, 16), nn.Sequential()
        for i in (1, 2, 3):
            group = nn.Sequential()  # the official names have a level more: layer.0.block.0.conv_0
            group.block = stack(SwishBlock, planes[i - 1], planes[i], n, 1 if i == 1 else 2)
            self.layer.append(group)

    def convolutions(self, x):
        return self.layer(self.init_conv(x))


class PreActResNet18Swish(SwishNetwork):
    def __init__(self, num_classes=10, in_channels=3):
        super().__init__(512, num_classes, in_channels)
        self.conv_2d = conv3x3(in_channels, 64)
        self.layer_0 = stack(PreActSwishBlock, 64, 64, 2, 1)
        self.layer_1 = stack(PreActSwishBlock, 64, 128, 2, 2)
        self.layer_2 = stack(PreActSwishBlock, 128, 256, 2, 2)
        self.layer_3 = stack(PreActSwishBlock, 256, 512, 2, 2)

    def convolutions(self, x):
        return self.layer_3(self.layer_2(self.layer_1(self.layer_0(self.conv_2d(x)))))


class SmallCNN(Network):
    """The MNIST network of TRADES, for 28 x 28 images.

    Its own initialisation is part of it: with torch's default it stays at chance for long.
    """
    image_size = 28

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

    def features(self, x):
        return self.classifier[:-1](self.feature_extractor(x).flatten(1))

    def classify(self, features):
        return self.classifier.fc3(features)


def build_model(arch, num_classes=10, in_channels=None, final_bn=True, init_from=None):
    """A new Network. arch: one of ARCHS, wideresnet<depth>-<width> in general, or FILE.py:NAME or
    package.module:NAME of one's own.

    in_channels: 1 or 3; default 1 for smallcnn, else 3. init_from: a file for load_model, whose
    weights it starts from. Raises ValueError for an unknown arch, and what load_model raises.
    """
    if init_from:
        model = load_model(init_from, arch, num_classes)
        new = build_model(arch, num_classes, in_channels) if model.input_normalization else model
        if model.input_normalization != new.input_normalization:
            raise ValueError(f'{init_from}: holds a normalization, which no run keeps')
        return model.train()
    in_channels = in_channels or (1 if arch == 'smallcnn' else 3)
    wide = re.fullmatch(r'wideresnet(\d+)-(\d+)(-swish)?', arch)
    residual = re.fullmatch(r'resnet(18|34|50)', arch)
    if ':' in arch:
        return own_network(arch, num_classes)
    if arch == 'preactresnet18':
        model = PreActResNet18(num_classes, in_channels, final_bn)
    elif arch == 'preactresnet18-raw':
        model = PreActResNet18Raw(num_classes, in_channels, final_bn)
    elif arch == 'preactresnet18-swish':
        model = PreActResNet18Swish(num_classes, in_channels)
    elif residual:
        model = ResNet(int(residual[1]), num_classes, in_channels)
    elif arch == 'smallcnn':
        model = SmallCNN(num_classes, in_channels)
    elif wide and int(wide[1]) >= 10 and int(wide[1]) % 6 == 4 and int(wide[2]) > 0:
        kind = WideResNetSwish if wide[3] else WideResNet
        model = kind(int(wide[1]), int(wide[2]), num_classes, in_channels)
    else:
        raise ValueError(f"unknown arch '{arch}' (choose from {KNOWN_ARCHS})")
    model.num_classes, model.in_channels = num_classes, in_channels
    return model


def check_fit(model, shape, num_classes, name):
    """ValueError, with that name in it, where a network does not make logits (B, K) of images
    (B, *shape). One's own is tried, and left in eval mode."""
    if model.own:
        images = torch.zeros(2, *shape)
        images = images.to(next(model.parameters(), images).device)
        try:
            with torch.no_grad():
                logits = model.eval()(images)
        except Exception as error:  # of whatever code it is
            raise ValueError(f'{name}: does not take images {shape}: {one_line(error)}') from error
        given = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
        if given != (2, num_classes):
            raise ValueError(f'{name}: gives {given} of 2 images, not logits (2, {num_classes})')
    elif model.num_classes != num_classes:
        raise ValueError(f'{name}: has {model.num_classes} classes, not {num_classes}')
    elif model.in_channels != shape[0]:
        raise ValueError(f'{name}: takes {model.in_channels}-channel images, not {shape[0]}')
    elif model.image_size not in (None, shape[1]) or model.image_size not in (None, shape[2]):
        raise ValueError(f'{name}: takes {model.image_size} x {model.image_size} images')


# ---------------------------------------------------------------- one's own network

# Code is run only if the user names it. What --arch named on this machine is remembered, as ssh
# remembers hosts, so that a run's checkpoints find their network again; any other file that names
# code is refused.
NAMED = os.path.join(os.environ.get('XDG_CONFIG_HOME') or os.path.expanduser('~/.config'),
                     'ewat_networks')


def full_arch(text):
    """The type of --arch: a file's path from the root, to be found from anywhere."""
    path, colon, name = text.rpartition(':')
    return f'{os.path.abspath(path)}:{name}' if path.endswith('.py') else text


def is_named(arch):
    """Whether --arch has named that network on this machine before."""
    with contextlib.suppress(OSError), open(NAMED, encoding='utf-8') as f:
        return arch in f.read().splitlines()
    return False


def refuse_unnamed(arch, path):
    """ValueError where a file names a network of one's own that the user never named here."""
    if ':' in arch and not is_named(arch):
        raise ValueError(f'{path} names code to run; if you trust it: --arch {arch}')


def own_network(arch, num_classes):
    """What FILE.py:NAME or package.module:NAME gives, called with num_classes where it takes it.

    Runs that code and remembers its name. Raises ValueError with one line.
    """
    path, _, name = full_arch(arch).rpartition(':')
    try:
        if path.endswith('.py'):
            folder, file = os.path.split(path)
            if folder not in sys.path:
                sys.path.append(folder)  # for what it imports
            spec = importlib.util.spec_from_file_location(f'network_{file[:-3]}', path)
            sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(path)
        make = getattr(module, name)
        takes = inspect.signature(make).parameters.values()
        known = any(p.name == 'num_classes' or p.kind == p.VAR_KEYWORD for p in takes)
        known &= getattr(make, '__init__', None) is not nn.Module.__init__  # which takes nothing
        model = make(num_classes=num_classes) if known and num_classes else make()
        if not isinstance(model, nn.Module):
            raise TypeError(f'gives a {type(model).__name__}, not an nn.Module')
        hidden = [k for k in ('amp', 'input_normalization', 'about', 'own', 'plain_forward',
                              'normalize_input') if hasattr(model, k)]
        if hidden:
            raise TypeError(f'{", ".join(hidden)} of its class would be hidden by ours')
        kind = type(model)  # a class instead of a wrapper: the names of the weights stay
        its = {k: getattr(kind, k) for k in ('num_classes', 'in_channels', 'image_size')
               if hasattr(kind, k)}
        model.__class__ = type(kind.__name__, (Network, kind), its | {
            'plain_forward': kind.forward, 'own': inspect.getsource(module)})
    except Exception as error:  # of whatever code it is
        raise ValueError(f'--arch {arch}: {one_line(error)}') from error
    if not is_named(full_arch(arch)):
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(NAMED), exist_ok=True)
            with open(NAMED, 'a', encoding='utf-8') as f:
                f.write(f'{full_arch(arch)}\n')
    return model


def one_line(error):
    """An exception as a line that says where in other code than this it was raised."""
    first = (str(error).strip() or 'no message').splitlines()[0]
    places = [f'{os.path.basename(frame.filename)}:{frame.lineno}'
              for frame in traceback.extract_tb(error.__traceback__)
              if not frame.filename.startswith('<') and frame.filename != __file__]
    return f'{type(error).__name__}: {first}' + (f' ({places[-1]})' if places else '')


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
    """The weights in a checkpoint, {name: tensor}; ValueError if there are none."""
    keys = ('ema_state_dict', 'model_ema', 'state_dict', 'model_state_dict', 'net', 'model',
            'rmodel', 'weights', 'best', 'last')
    state = content
    while isinstance(state, dict):
        if state and all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
            break
        state = next((state[k] for k in keys if isinstance(state.get(k), dict)), None)
    # n_averaged: a count of torch's AveragedModel
    if not isinstance(state, dict) or not state.keys() - {'n_averaged'}:
        raise ValueError(f'holds no state_dict, but {describe(content)}; weights are read that '
                         'were saved by torch.save(model.state_dict(), FILE)')
    return {k: v for k, v in state.items() if k != 'n_averaged'}


def without_prefix(state, expected=()):
    """A state_dict without the parts that all its names begin with, such as module. or net., or as
    many of them as make it that of the expected names."""
    def names(state):
        return {k for k in state if not k.endswith('num_batches_tracked')}
    while names(state) != names(expected) and all('.' in k for k in state) and 1 == len(
            {k.partition('.')[0] for k in state}):
        state = {k.partition('.')[2]: v for k, v in state.items()}
    return state


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
    head = known('linear.weight', 'fc.weight', 'classifier.fc3.weight', 'logits.weight')
    first = known('conv1.weight', 'feature_extractor.conv1.weight', 'init_conv.weight',
                  'conv_2d.weight')
    blocks = [k for k in state if re.fullmatch(
        r'(block1\.layer|layer\.0\.block)\.\d+\.conv_?1\.weight', k)]
    layers = tuple(len([k for k in state if re.fullmatch(
        rf'layer({i}|_{i - 1})\.\d+\.(conv1|conv_2d_1)\.weight', k)]) for i in (1, 2, 3, 4))
    fits = head and first and (state[head].ndim, state[first].ndim) == (2, 4)
    swish = '-swish' if fits and head == 'logits.weight' else ''
    depth = next((depth for depth, (block, _, blocks) in RESNETS.items() if blocks == layers and (
        block is Bottleneck) == ('layer1.0.conv3.weight' in state)), None)
    if fits and blocks:
        arch = f'wideresnet{6 * len(blocks) + 4}-{state[blocks[0]].shape[0] // 16}{swish}'
    elif fits and head == 'classifier.fc3.weight':
        arch = 'smallcnn'
    elif fits and 'bn1.weight' in state and depth:
        arch = f'resnet{depth}'
    elif fits and layers == (2, 2, 2, 2) and 'bn1.weight' not in state:
        arch = f'preactresnet18{swish}'
    else:
        what = f'a ResNet of {list(layers)} blocks, ' if fits and any(layers) else ''
        raise ValueError(f"{what}names of no known network ({', '.join(sorted(state)[:3])}, ...); "
                         f'known are {KNOWN_ARCHS}')
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

    path: a bare state_dict, or one under a usual name such as 'state_dict' or 'model', averaged
    weights first, with any prefix. arch, num_classes: checked against the file, and read off the
    shapes where None; a network of one's own is named by arch or, where is_named, by the file.
    normalize: see parse_normalization. Loading is strict. Its attribute `about` is what the file
    says of the dataset and, if it is this project's, of the algorithm and args.
    Raises FileNotFoundError or ValueError with one line that names the file.
    """
    normalize = parse_normalization(normalize)
    content = read_checkpoint(path)
    try:
        state = find_state_dict(content)
        if arch is None and ':' in str(content.get('arch')):
            refuse_unnamed(content['arch'], 'it')
            arch = content['arch']
        if arch and ':' in arch:
            model = build_model(arch, num_classes or content.get('num_classes'))
            state = without_prefix(state, model.state_dict())
        else:
            inside = take_normalization(state)
            if inside and normalize:
                raise ValueError('has a normalization of its own, beside --normalize')
            normalize = inside or normalize
            state = {k: v for k, v in without_prefix(state).items()
                     if not k.startswith('sub_block1.')}  # unused, in TRADES' WideResNet
            try:
                found = infer_arch(state)
            except ValueError:
                if arch is None:
                    raise
                found = arch, num_classes or 10, None, True
            if num_classes not in (None, found[1]):
                raise ValueError(f'has {found[1]} classes, not {num_classes}')
            model = build_model(arch or found[0], *found[1:])
        load_strictly(model, state, arch or found[0])
        if normalize:
            model.set_normalization(*normalize)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f'{path}: {error}') from None
    kinds = dict(dataset=str, algorithm=str, args=dict)
    model.about = {k: content[k] for k in kinds if isinstance(content.get(k), kinds[k])}
    return model.to(device).eval()


def load_strictly(model, state, arch):
    """Load a state_dict; ValueError where names or shapes differ or a number is not finite."""
    expected = model.state_dict()
    for k in expected:  # a counter that nothing reads; old files lack it
        if k.endswith('.num_batches_tracked'):
            state.setdefault(k, expected[k])
    missing = [k for k in expected if k not in state]
    unexpected = [k for k in state if k not in expected]
    if missing or unexpected:
        raise ValueError(f'does not fit {arch}: missing {", ".join(missing[:3]) or "nothing"}; '
                         f'unexpected {", ".join(unexpected[:3]) or "nothing"}')
    odd = next((k for k in expected if expected[k].shape != state[k].shape), None)
    if odd:
        raise ValueError(f'does not fit {arch}: {odd} has shape {tuple(state[odd].shape)}, '
                         f'not {tuple(expected[odd].shape)}')
    model.load_state_dict(state)
    odd = next((k for k, v in model.state_dict().items() if not v.isfinite().all()), None)
    if odd:
        raise ValueError(f'{odd} is not finite: the training that wrote it diverged')


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
def frozen_statistics(model):
    """Leave the running statistics of batch normalization alone meanwhile."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
              and m.track_running_stats]
    for m in layers:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in layers:
            m.track_running_stats = True


@contextlib.contextmanager
def frozen(model):
    """Meanwhile no weight takes a gradient: that saves an attack memory, and the gradients
    themselves if the network is compiled."""
    weights = [p for p in model.parameters() if p.requires_grad]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_()


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
