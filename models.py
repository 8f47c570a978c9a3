"""Networks for L-infinity adversarial training, and reading weights from files.

    build_model('preactresnet18', num_classes=10)      a new network
    load_model('best.pt')                              a trained one, this project's or anyone's

Networks take images in [0, 1] and return logits. Parameter names are those of the official TRADES,
MART, GAIRAT and AWP repositories and of RobustBench, so weights can be exchanged with them.
"""
import contextlib
import copy
import fcntl
import importlib.util
import inspect
import math
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

ARCHS = ('preactresnet18, preactresnet18-raw, preactresnet18-swish, resnet18, resnet34, resnet50, '
         'wideresnet<depth>-<width>, wideresnet<depth>-<width>-swish, smallcnn, or your own '
         'FILE.py:NAME')
NORMALIZATIONS = {'cifar10': ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
                  'cifar100': ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}


# ---------------------------------------------------------------- networks

def conv3x3(in_planes, planes, stride=1):
    return nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)


def conv1x1(in_planes, planes, stride=1):
    return nn.Conv2d(in_planes, planes, 1, stride, bias=False)


def projection(in_planes, planes, stride):
    if stride == 1 and in_planes == planes:
        return nn.Sequential()
    return nn.Sequential(conv1x1(in_planes, planes, stride), nn.BatchNorm2d(planes))


class BasicBlock(nn.Module):
    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_planes, planes, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.shortcut = projection(in_planes, planes, stride)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    def __init__(self, in_planes, planes, stride):
        super().__init__()
        inner = planes // 4
        self.conv1, self.conv2 = conv1x1(in_planes, inner), conv3x3(inner, inner, stride)
        self.conv3, self.bn1 = conv1x1(inner, planes), nn.BatchNorm2d(inner)
        self.bn2, self.bn3 = nn.BatchNorm2d(inner), nn.BatchNorm2d(planes)
        self.shortcut = projection(in_planes, planes, stride)

    def forward(self, x):
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """Its shortcut takes the activated input (RobustBench's PreActBlockV2) or, with raw=True, the
    raw input (RobustBench's PreActBlock); the names of the weights are the same."""

    def __init__(self, in_planes, planes, stride, raw=False):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_planes), conv3x3(in_planes, planes, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv3x3(planes, planes)
        self.raw, self.shortcut = raw, None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(conv1x1(in_planes, planes, stride))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x if self.raw else out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class WideBlock(nn.Module):
    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_planes), conv3x3(in_planes, planes, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv3x3(planes, planes)
        self.convShortcut = conv1x1(in_planes, planes, stride) if in_planes != planes else None

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


def sequential(**layers):
    """The layers one after the other; their names are part of the names of their weights."""
    return nn.Sequential(OrderedDict(layers))


def stack(block, in_planes, planes, num_blocks, stride, **options):
    return nn.Sequential(block(in_planes, planes, stride, **options),
                         *(block(planes, planes, 1, **options) for _ in range(num_blocks - 1)))


class SpatialMean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def resnet(depth, num_classes, in_channels):
    """ResNet-18, -34 and -50 for small images."""
    block, e = (Bottleneck, 4) if depth == 50 else (BasicBlock, 1)
    blocks = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
    return sequential(
        conv1=conv3x3(in_channels, 64), bn1=nn.BatchNorm2d(64), relu=nn.ReLU(),
        layer1=stack(block, 64, 64 * e, blocks[0], 1),
        layer2=stack(block, 64 * e, 128 * e, blocks[1], 2),
        layer3=stack(block, 128 * e, 256 * e, blocks[2], 2),
        layer4=stack(block, 256 * e, 512 * e, blocks[3], 2),
        mean=SpatialMean(), linear=nn.Linear(512 * e, num_classes))


def preactresnet18(num_classes, in_channels, final_bn, raw):
    """final_bn=False leaves out the last batch normalization and ReLU, as some repositories do."""
    return sequential(
        conv1=conv3x3(in_channels, 64),
        layer1=stack(PreActBlock, 64, 64, 2, 1, raw=raw),
        layer2=stack(PreActBlock, 64, 128, 2, 2, raw=raw),
        layer3=stack(PreActBlock, 128, 256, 2, 2, raw=raw),
        layer4=stack(PreActBlock, 256, 512, 2, 2, raw=raw),
        **dict(bn=nn.BatchNorm2d(512), relu=nn.ReLU()) if final_bn else {},
        mean=SpatialMean(), linear=nn.Linear(512, num_classes))


def wideresnet(depth, width, num_classes, in_channels):
    n = (depth - 4) // 6
    model = sequential(
        conv1=conv3x3(in_channels, 16),
        block1=sequential(layer=stack(WideBlock, 16, 16 * width, n, 1)),
        block2=sequential(layer=stack(WideBlock, 16 * width, 32 * width, n, 2)),
        block3=sequential(layer=stack(WideBlock, 32 * width, 64 * width, n, 2)),
        bn1=nn.BatchNorm2d(64 * width), relu=nn.ReLU(), mean=SpatialMean(),
        fc=nn.Linear(64 * width, num_classes))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
    nn.init.zeros_(model.fc.bias)
    return model


class TensorFlowConv(nn.Conv2d):
    """A 3 x 3 convolution that pads as TensorFlow does: at stride 2 only on the right and below."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1) if self.stride == (1, 1) else (0, 1, 0, 1)))


class SwishBlock(nn.Module):
    """The block of DeepMind's WideResNet."""

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(in_planes), nn.BatchNorm2d(planes)
        self.conv_0 = TensorFlowConv(in_planes, planes, 3, stride, bias=False)
        self.conv_1 = conv3x3(planes, planes)
        self.shortcut = conv1x1(in_planes, planes, stride) if in_planes != planes else None

    def forward(self, x):
        out = F.silu(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv_1(F.silu(self.batchnorm_1(self.conv_0(out)))) + shortcut


class PreActSwishBlock(nn.Module):
    """The block of DeepMind's PreActResNet; its shortcut is a 3 x 3 convolution of the input."""

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(in_planes), nn.BatchNorm2d(planes)
        self.conv_2d_1 = TensorFlowConv(in_planes, planes, 3, stride, bias=False)
        self.conv_2d_2, self.shortcut = conv3x3(planes, planes), nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = TensorFlowConv(in_planes, planes, 3, stride, bias=False)

    def forward(self, x):
        out = self.conv_2d_1(F.silu(self.batchnorm_0(x)))
        return self.conv_2d_2(F.silu(self.batchnorm_1(out))) + self.shortcut(x)


class SwishNetwork(nn.Sequential):
    """Its first two layers, batch normalization and the last layer, are applied after the others:
    this is the order of the weights in DeepMind's code."""

    def forward(self, x):
        batchnorm, logits, *others = self
        for layer in others:
            x = layer(x)
        return logits(F.silu(batchnorm(x)).mean((2, 3)))


def wideresnet_swish(depth, width, num_classes, in_channels):
    """DeepMind's WideResNet (Gowal et al., 2020), with SiLU."""
    n = (depth - 4) // 6
    return SwishNetwork(OrderedDict(
        batchnorm=nn.BatchNorm2d(64 * width), logits=nn.Linear(64 * width, num_classes),
        init_conv=conv3x3(in_channels, 16),
        layer=nn.Sequential(
            sequential(block=stack(SwishBlock, 16, 16 * width, n, 1)),
            sequential(block=stack(SwishBlock, 16 * width, 32 * width, n, 2)),
            sequential(block=stack(SwishBlock, 32 * width, 64 * width, n, 2)))))


def preactresnet18_swish(num_classes, in_channels):
    """DeepMind's PreActResNet-18, with SiLU."""
    return SwishNetwork(OrderedDict(
        batchnorm=nn.BatchNorm2d(512), logits=nn.Linear(512, num_classes),
        conv_2d=conv3x3(in_channels, 64),
        layer_0=stack(PreActSwishBlock, 64, 64, 2, 1),
        layer_1=stack(PreActSwishBlock, 64, 128, 2, 2),
        layer_2=stack(PreActSwishBlock, 128, 256, 2, 2),
        layer_3=stack(PreActSwishBlock, 256, 512, 2, 2)))


def smallcnn(num_classes, in_channels):
    """TRADES' MNIST network, for 28 x 28 images.

    The initialization matters: with PyTorch's default, training stays at chance for a long time.
    """
    model = sequential(
        feature_extractor=sequential(
            conv1=nn.Conv2d(in_channels, 32, 3), relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 32, 3), relu2=nn.ReLU(), maxpool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 64, 3), relu3=nn.ReLU(),
            conv4=nn.Conv2d(64, 64, 3), relu4=nn.ReLU(), maxpool2=nn.MaxPool2d(2)),
        flatten=nn.Flatten(),
        classifier=sequential(
            fc1=nn.Linear(64 * 4 * 4, 200), relu1=nn.ReLU(), drop=nn.Dropout(0.5),
            fc2=nn.Linear(200, 200), relu2=nn.ReLU(), fc3=nn.Linear(200, num_classes)))
    for m in model.feature_extractor:
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
            nn.init.zeros_(m.bias)
    nn.init.zeros_(model.classifier.fc3.weight)
    nn.init.zeros_(model.classifier.fc3.bias)
    return model


def normalized(model, x):
    return (x[0] - model._image_mean) / model._image_std


def normalize_input(model, mean, std):
    """From now on, the network takes (x - mean) / std in place of x; returns it.

    mean, std: one value or one for each channel. Raises ValueError unless std is above 0.
    """
    finite = all(map(math.isfinite, [*mean, *std]))
    if not finite or min(std) <= 0 or {len(mean), len(std)} - {1, 3}:
        raise ValueError(f'images cannot be normalized by mean {mean} and std {std}')
    if not hasattr(model, '_image_mean'):
        model.register_forward_pre_hook(normalized, prepend=True)
    for name, values in (('_image_mean', mean), ('_image_std', std)):
        model.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
    return model


def build_model(arch, num_classes=10, in_channels=3, final_bn=True):
    """A new network. arch: one of ARCHS. Raises ValueError if it is unknown or its code fails."""
    wide = re.fullmatch(r'wideresnet(\d+)-([1-9]\d*)(-swish)?', arch)
    if ':' in arch:
        return own_network(arch, num_classes)
    if arch in ('preactresnet18', 'preactresnet18-raw'):
        model = preactresnet18(num_classes, in_channels, final_bn, raw=arch.endswith('raw'))
    elif arch == 'preactresnet18-swish':
        model = preactresnet18_swish(num_classes, in_channels)
    elif arch in ('resnet18', 'resnet34', 'resnet50'):
        model = resnet(int(arch[6:]), num_classes, in_channels)
    elif arch == 'smallcnn':
        model = smallcnn(num_classes, in_channels)
    elif wide and int(wide[1]) >= 10 and int(wide[1]) % 6 == 4:
        make = wideresnet_swish if wide[3] else wideresnet
        model = make(int(wide[1]), int(wide[2]), num_classes, in_channels)
    else:
        raise ValueError(f"unknown --arch '{arch}'; supported: {ARCHS}")
    if arch.endswith('swish') and in_channels == 3:  # as in the original code
        normalize_input(model, *NORMALIZATIONS['cifar100' if num_classes == 100 else 'cifar10'])
    model.memory_format = torch.channels_last  # in which their convolutions are fastest
    return model


def own_network(arch, num_classes):
    """The network that FILE.py:NAME returns, called with num_classes if it accepts that."""
    path, name = arch.rsplit(':', 1)
    try:
        sys.path.append(os.path.dirname(os.path.abspath(path)))  # for what it imports
        spec = importlib.util.spec_from_file_location('own_network', path)
        module = sys.modules['own_network'] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        make = getattr(module, name)
        takes_it = 'num_classes' in inspect.signature(make).parameters
        model = make(num_classes=num_classes) if takes_it else make()
        if not isinstance(model, nn.Module):
            raise TypeError('it is not a torch.nn.Module')
    except Exception as error:  # the user's code may raise anything
        raise ValueError(f'--arch {arch}: {type(error).__name__}: {error}') from error
    return model


def check_network(model, x, num_classes):
    """Raise ValueError unless a network can be attacked and trained on images such as x."""
    for mode in ('eval', 'train'):
        try:
            logits = getattr(copy.deepcopy(model), mode)()(x.requires_grad_())
            if logits.shape != (len(x), num_classes):
                raise ValueError(f'it returns {tuple(logits.shape)}, not {(len(x), num_classes)}')
            grad, = torch.autograd.grad(logits.sum(), x, allow_unused=True)
            if grad is None or not grad.isfinite().all():
                raise ValueError('its input receives no finite gradient')
            load_weights(copy.deepcopy(model), model.state_dict())  # as a resumed run does
        except Exception as error:  # the user's code may raise anything
            raise ValueError(f'the network cannot be trained on a batch {tuple(x.shape)}: '
                             f'{" ".join(str(error).split())} ({mode} mode)') from error


def accelerate(model, amp, mode=None, batch_sizes=()):
    """Run model.forward in bfloat16 (amp) and compiled (mode: a mode of torch.compile).

    Logits stay float32 and the state_dict is unchanged. Only batches of batch_sizes run compiled,
    because any other size would be compiled again. Each forward pass enters autocast itself,
    because a longer-lived cache would hide weights that AWP has changed.
    """
    eager = model.forward
    compiled = torch.compile(eager, mode=mode, dynamic=False) if mode else eager

    def forward(x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            if len(x) in batch_sizes:
                return compiled(x).float().clone()  # the next run of a CUDA graph overwrites it
            return eager(x).float()
    if amp or mode:
        model.forward = forward


# ---------------------------------------------------------------- files

@contextlib.contextmanager
def atomic_write(path, mode='w', **options):
    """open(path, mode), but the file appears under its name only when it is complete."""
    temporary = f'{path}.tmp'
    try:
        with open(temporary, mode, **options) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def lock(directory):
    """Lock a directory until this process ends; ValueError if another process has locked it."""
    file = open(os.path.join(directory, '.lock'), 'w')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f'another process is training in {directory}') from None
    except OSError:
        pass  # a file system without locks
    return file


class Inert(dict):
    """Takes the place of every object in a checkpoint that is not a tensor or a plain container.

    It is a dict because the object that it replaces may be the one that holds the weights.
    """
    __hash__, dump_patches = object.__hash__, False  # torch's old format asks for the latter

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    __setstate__ = append = extend = __call__


class Unpickler(pickle.Unpickler):
    """Builds tensors and plain containers; every other object becomes Inert. Imports nothing."""
    known = {('collections', 'OrderedDict'): OrderedDict,
             # __call__, because a pickle could change the defaults of the function itself
             **{('torch._utils', k): getattr(torch._utils, k).__call__
                for k in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter')}}

    def find_class(self, module, name):
        return self.known.get((module, name), Inert)


def load(path):
    """The content of a torch.save file, on the CPU; no code in the file is run.

    A directory means its best.pt. Raises ValueError with one line that names the file.
    """
    path = os.path.join(path, 'best.pt') if os.path.isdir(path) else os.fspath(path)
    try:
        with open(path, 'rb') as f:
            zipped = f.read(4) == b'PK\3\4'  # as torch.load decides
        if zipped and 'constants.pkl' in torch._C.PyTorchFileReader(path).get_all_records():
            raise ValueError('it is a TorchScript archive')  # torch.load would run it
        if zipped and zipfile.ZipFile(path).testzip():  # torch.load does not check the checksums
            raise ValueError('it is damaged')
        safe = SimpleNamespace(Unpickler=Unpickler, __name__='safe', load=lambda f, **options:
                               Unpickler(f, **options).load())
        content = torch.load(path, map_location='cpu', pickle_module=safe, weights_only=False)
        if not isinstance(content, dict):
            raise ValueError(f'it holds a {type(content).__name__}, not a state_dict')
        return content
    except Exception as error:  # a damaged file can make the parser raise anything
        raise ValueError(f'{path} cannot be read as a checkpoint: '
                         f'{" ".join(str(error).split())[:200]}') from None


def find_state_dict(content, expected=()):
    """(weights, (mean, std) or None) of a checkpoint; the averaged weights if it has them.

    Prefixes such as 'module.' are removed, unless they belong to the expected names.
    """
    keys = ('ema_state_dict', 'model_ema', 'state_dict', 'model_state_dict', 'net', 'model',
            'rmodel', 'weights', 'best', 'last')
    for _ in range(4):
        if not all(map(torch.is_tensor, content.values())):
            content = next((content[k] for k in keys
                            if isinstance(content.get(k), dict) and content[k]), {})
    state = {k: v for k, v in content.items() if k != 'n_averaged'}  # AveragedModel's
    if not state or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise ValueError('no state_dict found: save one with torch.save(model.state_dict(), FILE)')
    normalization = None
    for _ in range(2):  # prefixes before and after the normalization is taken out
        while len({k.split('.')[0] for k in state}) == 1 and all('.' in k for k in state) \
                and not state.keys() & set(expected):
            state = {k.split('.', 1)[1]: v for k, v in state.items()}
        for mean in [k for k in state if re.search(r'(^|\.)(mean|mu)$', k) and k not in expected]:
            std = re.sub('mean$', 'std', re.sub('mu$', 'sigma', mean))
            if std in state and state[mean].numel() in (1, 3):
                normalization = [state.pop(k).flatten().tolist() for k in (mean, std)]
    state = {k: v for k, v in state.items()  # TRADES' WideResNet has a block that it does not use
             if k in expected or not k.startswith('sub_block1.')}
    return state, normalization


def infer_arch(state):
    """(arch, num_classes, in_channels, final_bn) of a state_dict; ValueError if it is unknown."""
    def shapes(pattern):
        return [v.shape for k, v in state.items() if re.fullmatch(rf'({pattern})\.weight', k)]
    head = shapes(r'linear|fc|classifier\.fc3|logits')
    first = shapes(r'conv1|feature_extractor\.conv1|init_conv|conv_2d')
    wide = shapes(r'(block1\.layer|layer\.0\.block)\.\d+\.conv_?1')
    layers = [len(shapes(rf'layer({i}|_{i - 1})\.\d+\.(conv1|conv_2d_1)')) for i in (1, 2, 3, 4)]
    swish, arch = '-swish' if 'logits.weight' in state else '', None
    if wide:
        arch = f'wideresnet{6 * len(wide) + 4}-{wide[0][0] // 16}{swish}'
    elif 'classifier.fc3.weight' in state:
        arch = 'smallcnn'
    elif layers == [2, 2, 2, 2]:
        arch = 'resnet18' if 'bn1.weight' in state else f'preactresnet18{swish}'
    elif layers == [3, 4, 6, 3] and 'bn1.weight' in state:
        arch = 'resnet50' if 'layer1.0.conv3.weight' in state else 'resnet34'
    if not arch or [len(shape) for shape in head + first] != [2, 4]:
        raise ValueError(f"has the weights of no known network ({', '.join(sorted(state)[:3])}, "
                         f'...); supported: {ARCHS}')
    return arch, head[0][0], first[0][1], 'bn.weight' in state


def load_weights(model, content):
    """Load the weights in a checkpoint's content into a network; returns the (mean, std) beside
    them, or None. Raises ValueError or RuntimeError unless they are finite and fit the network."""
    state, normalization = find_state_dict(content, model.state_dict())
    if any(v.isnan().any() for v in state.values()):  # a mask may hold -inf
        raise ValueError('the weights are not finite: the training diverged')
    model.load_state_dict(state)
    return normalization


def start_from(model, path):
    """Load the weights of a checkpoint into a new network. Raises ValueError unless they fit it."""
    try:
        normalization = load_weights(model, load(path))
    except RuntimeError as error:
        raise ValueError(f'{path}: {error}') from None
    if normalization and not hasattr(model, '_image_mean'):
        raise ValueError(f'{path} holds a normalization of the images, which would be lost')


def load_model(path, arch=None, num_classes=None, normalize=None):
    """A trained network in eval mode, from this project's checkpoints or anyone's.

    path: a bare state_dict, or one under a usual name such as 'state_dict' or 'model', with any
    prefix. arch, num_classes: read off the weights if None; your own network must be named by arch.
    normalize: the (mean, std) by which its training images were normalized outside the network,
    unless the file holds them. Raises ValueError with one line that names the file.
    """
    content = load(path)
    try:
        own = content['arch'] if {'algorithm', 'arch', 'args'} <= content.keys() else ''
        if own:  # a run of this project, which knows its network
            normalize = None
            if ':' not in own:
                arch = own
            elif own.split(':')[-1] != (arch or '').split(':')[-1]:
                raise ValueError(f'was trained with --arch {own}: give it if you trust that code')
        if arch and ':' in arch:
            model = build_model(arch, num_classes or content.get('num_classes', 10))
        else:
            found, classes, *options = infer_arch(find_state_dict(content)[0])
            if num_classes not in (None, classes):
                raise ValueError(f'has {classes} classes, not {num_classes}')
            model = build_model(arch or found, classes, *options)
        normalize = load_weights(model, content) or normalize
        if normalize:
            normalize_input(model, *normalize)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f'{path}: {" ".join(str(error).split())[:400]}') from None
    return model.eval()


def mean_and_std(text):
    """none, cifar10, cifar100 or MEAN/STD -> None or (mean, std); the type of --normalize."""
    if text == 'none' or text in NORMALIZATIONS:
        return NORMALIZATIONS.get(text)
    mean, std = ([float(v) for v in part.split(',')] for part in text.split('/'))
    return mean, std


# ---------------------------------------------------------------- perturbed and averaged weights

def snapshot(tensors):
    """The tensors, each with a copy of its values, for restore."""
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


def restore(kept):
    """Give the tensors of a snapshot their values back, exactly."""
    with torch.no_grad():
        for tensor, values in kept:
            tensor.copy_(values)


def perturb_weights(model, gamma):
    """Adversarial weight perturbation (Wu et al., 2020): w += gamma ||w|| / ||g|| g, g = w.grad.

    Moves the parameters of two or more dimensions named weight, as the official code does; returns
    a snapshot of them. The official proxy network amounts to this: its learning rate cancels in the
    normalization.
    """
    kept = snapshot(w for name, w in model.named_parameters()
                    if 'weight' in name and w.dim() > 1 and w.grad is not None)
    with torch.no_grad():
        for w, _ in kept:
            w += gamma * w.norm() / (w.grad.norm() + 1e-12) * w.grad
    return kept


def average(ema, model, decay):
    """Move the weights of ema to decay * ema + (1 - decay) * model; its BN buffers are the model's.

    Unlike torch's AveragedModel, it does not make the host wait for the device.
    """
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)
    for ours, latest in zip(ema.buffers(), model.buffers()):
        ours.copy_(latest)
