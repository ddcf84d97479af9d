"""Wide ResNets for small images (arXiv 1605.07146) with the details of FixMatch and CCSSL, registered with timm.

Self-contained: this file is copied into published folders that need it.
"""

from __future__ import annotations

from typing import Any

from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import Tensor, nn

LEAKY_RELU_SLOPE = 0.1


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and LeakyReLU, and a shortcut.

    A block that changes the width or the resolution differs from the paper, as in the code of the published results: in
    the first stage (`preactivate=True`) the shortcut starts after the first activation. In later stages neither branch
    uses `bn1`, which stays for the keys of that code's weights.
    """

    def __init__(self, in_chs: int, out_chs: int, *, stride: int, preactivate: bool, conv_bias: bool = False) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=conv_bias)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=conv_bias)
        self.act = nn.LeakyReLU(LEAKY_RELU_SLOPE, inplace=True)
        changes = stride != 1 or in_chs != out_chs
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=conv_bias) if changes else None
        self.uses_bn1 = preactivate or not changes
        # Freeze unused parameters: DistributedDataParallel would wait for their gradients.
        self.bn1.requires_grad_(self.uses_bn1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(x)) if self.uses_bn1 else x
        residual = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.act(self.bn2(self.conv1(out))))
        return out + residual


def init_weights(module: nn.Module) -> None:
    """He initialisation (fan out) for convolutions, Xavier for linear layers, as in FixMatch's PyTorch versions."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
    elif isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(module.bias)


class WideResNetCifar(nn.Module):
    """A Wide ResNet with timm's interface. The arguments from `bn_eps` on exist for weights from USB and TorchSSL.

    Args:
        depth: Number of layers with weights on the longest path: `stages * (2 * blocks + 1) + 1`.
        width: Widening factor `k`; stage `s` (from 0) has `16 * k * 2**s` channels.
        stages: Number of stages; each but the first halves the resolution.
        bn_momentum: BatchNorm momentum. 0.001 needs thousands of steps to forget the initial statistics; use 0.1 for a
            run of hundreds of steps.
        last_bn_eps: Epsilon of the last BatchNorm; None: `bn_eps`.
        stem_bias, conv_bias: Whether the first convolution, and the convolutions in the blocks, have biases.
        preactivate_all: Whether blocks that change the width use `bn1` in every stage, not only in the first.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 2,
        stages: int = 3,
        first_stride: int = 1,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        bn_momentum: float = 0.001,
        bn_eps: float = 1e-5,
        last_bn_eps: float | None = None,
        stem_bias: bool = False,
        conv_bias: bool = False,
        preactivate_all: bool = False,
    ) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 1 - stages, 2 * stages)
        if remainder or blocks < 1:
            raise ValueError(f"depth {depth} does not fit {stages} stages: use {stages} * (2 * blocks + 1) + 1.")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=stem_bias)
        chs, reduction, layers = 16, 1, []
        self.feature_info: list[dict[str, Any]] = []
        for stage in range(stages):
            out_chs, stride = 16 * width * 2**stage, 2 if stage else first_stride
            options = {"preactivate": preactivate_all or stage == 0, "conv_bias": conv_bias}
            first = WideBlock(chs, out_chs, stride=stride, **options)
            rest = (WideBlock(out_chs, out_chs, stride=1, **options) for _ in range(blocks - 1))
            layers.append(nn.Sequential(first, *rest))
            chs, reduction = out_chs, reduction * stride
            self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=f"stages.{stage}"))
        self.stages = nn.Sequential(*layers)
        self.bn1 = nn.BatchNorm2d(chs)
        self.act = nn.LeakyReLU(LEAKY_RELU_SLOPE, inplace=True)
        self.num_features = self.head_hidden_size = chs
        self.global_pool, self.fc = create_classifier(chs, num_classes, pool_type=global_pool)
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum, module.eps = bn_momentum, bn_eps
        self.bn1.eps = bn_eps if last_bn_eps is None else last_bn_eps

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, and the pooling if `global_pool` is given."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        self.fc.apply(init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images `[N, 3, H, W]` to the last feature map, normalised and activated."""
        return self.act(self.bn1(self.stages(self.conv1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps the feature map to logits `[N, num_classes]`, or to pooled features `[N, num_features]`."""
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


_CFG = dict(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, interpolation="bicubic", classifier="fc")
_CFG.update(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616), first_conv="conv1")  # CIFAR-10

default_cfgs = generate_default_cfgs({f"wide_resnet{name}_cifar": _CFG for name in ("10_1", "28_2", "28_8", "37_2")})


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **shape: int) -> WideResNetCifar:
    features = dict(out_indices=tuple(range(shape.get("stages", 3))), flatten_sequential=True)
    return build_model_with_cfg(WideResNetCifar, variant, pretrained, feature_cfg=features, **shape, **kwargs)


def wide_resnet10_1_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNetCifar:
    """Wide ResNet 10-1 (86 thousand parameters with its projection head), for tests and demonstrations."""
    return _create("wide_resnet10_1_cifar", pretrained, kwargs, depth=10, width=1)


def wide_resnet28_2_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNetCifar:
    """Wide ResNet 28-2 (1.5 million parameters), the standard network for CIFAR-10."""
    return _create("wide_resnet28_2_cifar", pretrained, kwargs, depth=28, width=2)


def wide_resnet28_8_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNetCifar:
    """Wide ResNet 28-8 (23 million parameters), the standard network for CIFAR-100."""
    return _create("wide_resnet28_8_cifar", pretrained, kwargs, depth=28, width=8)


def wide_resnet37_2_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNetCifar:
    """Wide ResNet 37-2 (6 million parameters), the standard network for STL-10 (96 px), of stride 2 in every stage."""
    return _create("wide_resnet37_2_cifar", pretrained, kwargs, depth=37, width=2, stages=4, first_stride=2)


# The copy of this file in a published folder must not replace the models of the installed package.
for _entrypoint in (wide_resnet10_1_cifar, wide_resnet28_2_cifar, wide_resnet28_8_cifar, wide_resnet37_2_cifar):
    if not is_model(_entrypoint.__name__):
        register_model(_entrypoint)


# The classes of `AutoModel.from_pretrained(folder, trust_remote_code=True)` and of AutoModelForImageClassification.
_WRAPPERS = {
    "WideResNetCifarModel": "TimmWrapperModel",
    "WideResNetCifarForImageClassification": "TimmWrapperForImageClassification",
}


def __getattr__(name: str) -> Any:
    """Create a class of `_WRAPPERS` when transformers asks for it: timm alone needs neither it nor transformers."""
    if name not in _WRAPPERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import transformers

    base = getattr(transformers, _WRAPPERS[name])
    return globals().setdefault(name, type(name, (base,), {"__module__": __name__, "__doc__": base.__doc__}))
