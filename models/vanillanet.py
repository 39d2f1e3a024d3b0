"""VanillaNet, an image classifier of 5 to 13 layers without shortcuts or attention.

Chen, Wang, Guo, Tao, "VanillaNet: the Power of Minimalism in Deep Learning", NeurIPS 2023,
https://arxiv.org/abs/2305.12972

The network has two forms. In the *train form*, every layer is a pair of convolutions, and the nonlinearity between them
fades out during training ("Deep Training Strategy" in the paper). The faded pair is linear, so `switch_to_deploy` can
merge it into one convolution without changing the function: the *deploy form* really has 5 to 13 layers. The
series-informed activation makes up for the lack of depth ("Series Informed Activation Function").
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from . import workarounds
from .checkpointing import checkpointed
from .fusion import fold_bn, merge_pointwise
from .safe_globals import SAFE_GLOBALS

__all__ = ["Block", "FadingReLU", "SeriesActivation", "VanillaNet"]  # register_model adds the entry points

BN_EPS = 1e-6


class FadingReLU(nn.Module):
    """The nonlinearity of deep training, A'(x) = (1 - lambda) ReLU(x) + lambda x (paper, Deep Training Strategy).

    Lambda is the negative slope of a LeakyReLU: 0 gives ReLU, 1 gives the identity, which is free in eager mode. Lambda
    is stored twice, as a Python number and as a tensor, and neither is in the state dict. Eager mode reads the number,
    because reading the tensor would wait for the device. A compiled graph reads the tensor, because each new number
    would make it compile again. The input may have any shape, and the output has the same shape.
    """

    def __init__(self, device=None, dtype=None):
        super().__init__()
        self.slope = 1.0
        self.register_buffer("slope_tensor", torch.ones((), device=device, dtype=dtype), persistent=False)

    def set_slope(self, slope: float) -> None:
        """Set lambda in place. Raises ValueError for a value outside [0, 1]."""
        if not 0.0 <= slope <= 1.0:
            raise ValueError(f"the slope of the fading activation must be in [0, 1], not {slope}")
        self.slope = float(slope)
        self.slope_tensor.fill_(slope)

    def _apply(self, fn, recurse: bool = True):
        """Restore the exact value after a move or conversion: a cast rounds it, and `to_empty` leaves it undefined."""
        super()._apply(fn, recurse)
        self.slope_tensor.fill_(self.slope)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A compiled graph would be guarded on the number, so it uses the tensor. The compiler fuses the three operators
        # into the normalization before them; run eagerly, they are several times slower than `leaky_relu`.
        if torch.compiler.is_compiling():
            return torch.where(x > 0, x, x * self.slope_tensor)
        return x if self.slope == 1.0 else F.leaky_relu(x, negative_slope=self.slope)

    def extra_repr(self) -> str:
        return f"slope={self.slope}"


class SeriesActivation(nn.Conv2d):
    """The series-informed activation (paper, Series Informed Activation Function), (N, C, H, W) -> (N, C, H, W).

    A_s(x)[h, w, c] = sum over i, j in {-n..n} of a[i, j, c] ReLU(x[h + i, w + j, c]) is a ReLU followed by a depthwise
    (2n+1) x (2n+1) convolution. A BatchNorm follows; the deploy form has it folded into the weight and bias.

    Args:
        dim: number of channels C.
        act_num: n; with 0, each channel has a single weight, which only scales its ReLU.
        deploy: build the deploy form.
    """

    def __init__(self, dim: int, act_num: int = 3, deploy: bool = False, device=None, dtype=None):
        if act_num < 0:
            raise ValueError(f"act_num must be 0 or more, not {act_num}")
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, dim, 2 * act_num + 1, padding=act_num, groups=dim, bias=deploy, **dd)
        self.act_num = act_num
        self.bn = None if deploy else nn.BatchNorm2d(dim, eps=BN_EPS, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(x)
        if self.bn is None:
            return self._conv_forward(x, self.weight, self.bias)
        if self.training:
            x = workarounds.depthwise_conv2d(x, self.weight, self.act_num)
        else:
            x = self._conv_forward(x, self.weight, self.bias)
        return self.bn(x)

    def switch_to_deploy(self) -> None:
        """Fold the BatchNorm into the convolution. A second call does nothing."""
        if self.bn is None:
            return
        folded = fold_bn(self, self.bn)
        self.weight, self.bias, self.bn = folded.weight, folded.bias, None


def _conv_bn(dim: int, dim_out: int, **dd) -> nn.Sequential:
    return nn.Sequential(workarounds.PointwiseConv2d(dim, dim_out, **dd), nn.BatchNorm2d(dim_out, eps=BN_EPS, **dd))


def _check_faded(slope: float) -> None:
    """Raise ValueError unless lambda is 1: merging a pair whose nonlinearity still acts would change the function."""
    if slope != 1.0:
        raise ValueError(
            f"the activation slope is {slope}: pairs of layers can be merged only at 1, where they are linear; "
            "train past decay_epochs, or call change_act(1.0) if the weights are known to be finished"
        )


class Block(nn.Module):
    """One stage, (N, dim, H, W) -> (N, dim_out, H / stride, W / stride): 1x1 convolution(s), max-pool, activation.

    Args:
        dim: number of input channels.
        dim_out: number of output channels.
        act_num: n of the series activation.
        stride: kernel size and stride of the max-pool; 1 leaves the pool out.
        deploy: build the deploy form, in which one convolution `conv` replaces `conv1` and `conv2`.
        ada_pool: height and width of the output of an adaptive max-pool; 0 or None pools by `stride` instead.
    """

    __jit_unused_properties__ = ("act_learn", "deploy")

    def __init__(
        self,
        dim: int,
        dim_out: int,
        act_num: int = 3,
        stride: int = 2,
        deploy: bool = False,
        ada_pool: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        for name in ("conv1", "relu", "conv2", "conv"):
            self.register_module(name, None)  # both forms' slots: fused and built deploy forms order parameters alike
        self.conv1 = None if deploy else _conv_bn(dim, dim, **dd)
        self.relu = None if deploy else FadingReLU(**dd)
        self.conv2 = None if deploy else _conv_bn(dim, dim_out, **dd)
        self.conv = nn.Conv2d(dim, dim_out, 1, **dd) if deploy else None
        if ada_pool:
            self.pool = nn.AdaptiveMaxPool2d((ada_pool, ada_pool))
        else:
            self.pool = nn.Identity() if stride == 1 else nn.MaxPool2d(stride)
        self.act = SeriesActivation(dim_out, act_num, deploy, **dd)

    @property
    def deploy(self) -> bool:
        return self.conv is not None

    @property
    def act_learn(self) -> float:
        """Lambda, the slope of the fading activation; 1 in deploy form."""
        return 1.0 if self.relu is None else self.relu.slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv is not None:
            x = self.conv(x)  # (N, dim, H, W) -> (N, dim_out, H, W)
        else:
            x = self.conv1(x)  # (N, dim, H, W) -> (N, dim, H, W)
            x = self.conv2(self.relu(x))  # -> (N, dim_out, H, W)
        x = self.pool(x)  # -> (N, dim_out, H / stride, W / stride)
        return self.act(x)

    def switch_to_deploy(self) -> None:
        """Fuse into the deploy form, in place. A second call does nothing. Raises ValueError if lambda is below 1."""
        if self.deploy:
            return
        _check_faded(self.act_learn)
        self.conv = merge_pointwise(fold_bn(*self.conv1), fold_bn(*self.conv2))
        self.conv1 = self.relu = self.conv2 = None
        self.act.switch_to_deploy()


class VanillaNet(nn.Module):
    """The network (paper, A Vanilla Neural Architecture), (N, in_chans, H, W) -> (N, num_classes).

    Args:
        in_chans: number of input channels.
        num_classes: number of classes; 0 leaves out the classifier, so that the network returns the pooled features.
        dims: number of channels of the stem and of each stage; one entry more than `strides`.
        drop_rate: probability of dropout before the classifier.
        act_num: n of the series activations; 3 for classification, 4 for detection.
        strides: max-pool stride of each stage.
        deploy: build the deploy form.
        ada_pool: adaptive pool size of each stage; 0 pools by stride. If given, the stem has stride 3 and padding 1.
        width_mult: factor on `dims`.
        global_pool: timm's pool type: avg, max, avgmax or catavgmax; an empty string keeps the map, (N, classes, h, w).
        img_size: input size to adapt the sizes in `ada_pool` to, which are for 224.
        act_learn: initial lambda, for example of a network saved in the middle of its ramp; see `change_act`.
        device, dtype: device and data type of the parameters.

    Raises:
        ValueError: list lengths do not match, a stride is below 1, a layer has no channels, the pool type is unknown,
            `img_size` is not square or lacks `ada_pool`, or lambda is outside [0, 1] or not 1 in deploy form.
    """

    __jit_unused_properties__ = ("act_learn", "deploy")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = (512, 1024, 2048, 4096, 4096),
        drop_rate: float = 0.0,
        act_num: int = 3,
        strides: Sequence[int] = (2, 2, 2, 1),
        deploy: bool = False,
        ada_pool: Sequence[int] | None = None,
        *,
        width_mult: float = 1.0,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        act_learn: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dims, strides = tuple(dims), tuple(strides)
        pools = tuple(ada_pool) if ada_pool else (0,) * len(strides)
        if img_size is not None and not ada_pool:
            raise ValueError("img_size belongs to ada_pool; without it the network takes any input size")
        if len(dims) != len(strides) + 1 or len(pools) != len(strides):
            raise ValueError(
                f"dims must have one entry more than strides, ada_pool as many; got {len(dims)}, {len(strides)}"
                + (f" and {len(pools)}" if ada_pool else "")
            )
        dims = tuple(round(dim * width_mult) for dim in dims)
        if min(dims) < 1:
            raise ValueError(f"width_mult {width_mult} leaves a layer without channels")
        if min(strides, default=0) < 1:
            raise ValueError(f"there must be stages, with strides of 1 or more, not {strides}")
        dd = {"device": device, "dtype": dtype}
        self._fusion = workarounds.RootFusion(self)  # first child, so that timm fuses the network before its parts
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.drop_rate = drop_rate
        self.set_grad_checkpointing(False)

        stem_stride, stem_padding = (3, 1) if ada_pool else (4, 0)
        if ada_pool and img_size is not None:
            pools = _adapt_pools(pools, strides, img_size, stem_stride, stem_padding)
        stem = {"kernel_size": 4, "stride": stem_stride, "padding": stem_padding, **dd}
        for name in ("stem1", "relu", "stem2", "stem", "stages", "cls1", "cls2", "cls"):
            self.register_module(name, None)  # both forms' slots: fusing adds no child while timm iterates
        if deploy:
            self.stem = nn.Sequential(
                nn.Conv2d(in_chans, dims[0], **stem), SeriesActivation(dims[0], act_num, deploy, **dd)
            )
        else:
            self.relu = FadingReLU(**dd)
            self.stem1 = nn.Sequential(nn.Conv2d(in_chans, dims[0], **stem), nn.BatchNorm2d(dims[0], eps=BN_EPS, **dd))
            self.stem2 = _conv_bn(dims[0], dims[0], **dd).append(SeriesActivation(dims[0], act_num, **dd))
        self.stages = nn.Sequential(
            *(
                Block(dim, dim_out, act_num, stride, deploy, pool, **dd)
                for dim, dim_out, stride, pool in zip(dims[:-1], dims[1:], strides, pools, strict=True)
            )
        )
        self._levels = _feature_levels(strides)
        reductions = list(accumulate(strides, mul, initial=stem_stride))
        self.feature_info = [
            {
                "num_chs": dims[level],
                "reduction": reductions[level],
                "module": f"stages.{level - 1}" if level else ("stem.1" if deploy else "stem2.2"),
            }
            for level in self._levels
        ]
        self._build_head(num_classes, global_pool, deploy, **dd)
        self.apply(self._init_weights)
        if deploy:
            _name_deployed_layers(self)
        if act_learn != 1.0:
            self.change_act(act_learn)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            # Draw in float32: a bfloat16 draw often rounds to the end of its range and becomes 2 instead of about 0.02.
            weight = trunc_normal_(torch.empty_like(module.weight, dtype=torch.float32), std=0.02)
            with torch.no_grad():
                module.weight.copy_(weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _build_head(self, num_classes: int, global_pool: str, deploy: bool, **dd) -> None:
        if global_pool.removeprefix("fast") not in ("", "avg", "max", "avgmax", "catavgmax"):
            raise ValueError(f"global_pool must be one of timm's pool types, not {global_pool!r}")
        self.global_pool = global_pool  # timm's save_for_hf reads this attribute
        pool = SelectAdaptivePool2d(pool_type=global_pool)  # (N, num_features, h, w) -> (N, head_hidden_size, 1, 1)
        self.head_hidden_size = self.num_features * pool.feat_mult()
        self.flatten = nn.Flatten(1) if global_pool else nn.Identity()
        features = [pool, nn.Dropout(self.drop_rate)]
        logits = [nn.Conv2d(self.head_hidden_size, num_classes, 1, **dd)] if num_classes else []
        if deploy:
            self.cls = nn.Sequential(*features, *logits)
            return
        if num_classes:
            logits.append(nn.BatchNorm2d(num_classes, eps=BN_EPS, **dd))
        self.cls1 = nn.Sequential(*features, *logits)
        self.cls2 = nn.Sequential(*([nn.Conv2d(num_classes, num_classes, 1, **dd)] if num_classes else []))

    # -- the two forms

    @property
    def deploy(self) -> bool:
        """Whether the network is in deploy form."""
        return self.stem is not None

    @property
    def act_learn(self) -> float:
        """Lambda, the slope of the fading activations; 1 in deploy form."""
        return 1.0 if self.relu is None else self.relu.slope

    @torch.jit.ignore
    def change_act(self, slope: float) -> None:
        """Set lambda, the slope of all fading activations (paper, Deep Training Strategy).

        Raises:
            ValueError: the slope is outside [0, 1], or not 1 for a deployed network, which has no fading activation.
        """
        if self.deploy and slope != 1.0:
            raise ValueError(f"a deployed network has no fading activation to set to {slope}")
        for module in self.modules():
            if isinstance(module, FadingReLU):
                module.set_slope(slope)
        self._record(act_learn=self.act_learn)

    def _record(self, **kwargs) -> None:
        """Record arguments for timm's save_for_hf, so that create_model builds the network that the weights fit."""
        self._model_args = {**getattr(self, "_model_args", {}), **kwargs}

    @torch.jit.ignore
    def switch_to_deploy(self) -> None:
        """Fuse into the deploy form, in place (paper, Deep Training Strategy). A second call does nothing.

        Raises:
            ValueError: lambda is below 1, where fusing would change the function; the network is left as it was.
        """
        if self.deploy:
            return
        _check_faded(min(module.slope for module in self.modules() if isinstance(module, FadingReLU)))
        stem_conv, stem_bn, stem_act = self.stem2
        stem_act.switch_to_deploy()
        self.stem = nn.Sequential(merge_pointwise(fold_bn(*self.stem1), fold_bn(stem_conv, stem_bn)), stem_act)
        for block in self.stages:
            block.switch_to_deploy()
        pool, dropout, *logits = self.cls1
        self.cls = nn.Sequential(
            pool, dropout, *([merge_pointwise(fold_bn(*logits), self.cls2[0])] if logits else [])
        ).train(self.training)
        self.stem.train(self.training)
        self.relu = self.stem1 = self.stem2 = self.cls1 = self.cls2 = None
        if self.feature_info[0]["module"] == "stem2.2":
            self.feature_info[0]["module"] = "stem.1"
        self._record(deploy=True, act_learn=1.0)
        _name_deployed_layers(self)

    # -- forward

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, dims[0], H/4, W/4); with `ada_pool`, H/3 and W/3."""
        if self.stem is not None:
            return self.stem(x)
        x = self.stem1(x)  # (N, in_chans, H, W) -> (N, dims[0], H/4, W/4)
        return self.stem2(self.relu(x))  # the same shape

    @torch.jit.ignore
    def _run(self, part: Callable, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpointed(part, module, self.checkpoint_mode, x) if self.grad_checkpointing else part(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, num_features, h, w), unpooled; all variants without `ada_pool` have h = H/32."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = self._run(self.forward_stem, self, x)
            for stage in self.stages:
                x = self._run(stage, stage, x)
            return x
        x = self.forward_stem(x)  # (N, in_chans, H, W) -> (N, dims[0], H/4, W/4)
        return self.stages(x)  # -> (N, num_features, h, w)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(N, num_features, h, w) -> (N, num_classes); with `pre_logits`, pooled features (N, head_hidden_size)."""
        if self.cls is not None:
            x = self.cls[1](self.cls[0](x)) if pre_logits else self.cls(x)
        elif pre_logits or self.num_classes == 0:
            x = self.cls1[1](self.cls1[0](x))  # (N, num_features, h, w) -> (N, head_hidden_size, 1, 1)
        else:
            x = self.cls2(self.relu(self.cls1(x)))  # (N, num_features, h, w) -> (N, num_classes, 1, 1)
        return self.flatten(x)  # (N, num_classes, 1, 1) -> (N, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)  # (N, in_chans, H, W) -> (N, num_features, h, w)
        return self.forward_head(x)  # -> (N, num_classes)

    # -- timm's model interface

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Return the feature maps at the levels of `feature_info`, each from the last layer at its resolution.

        Args:
            x: images (N, in_chans, H, W).
            indices: levels to return: a number n for the last n, a list (negative from the end), or None for all.
            norm: accepted for compatibility with timm; the network has no final norm.
            stop_early: skip the stages after the last requested level.
            output_fmt: NCHW, the only supported layout.
            intermediates_only: return only the list of maps, without the final features.

        Returns:
            A list of maps (N, C, h, w), or a pair of the final features and this list.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, not {output_fmt}")
        take, last = feature_take_indices(len(self._levels), indices=indices)
        wanted = [self._levels[index] for index in take]
        x = self._run(self.forward_stem, self, x)
        maps = {0: x}
        stages = self.stages[: self._levels[last]] if stop_early else self.stages
        for position, stage in enumerate(stages, 1):
            x = self._run(stage, stage, x)
            maps[position] = x
        intermediates = [maps[level] for level in wanted]
        return intermediates if intermediates_only else (x, intermediates)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last given level and, by default, the classifier. Returns the level indices."""
        take, last = feature_take_indices(len(self._levels), indices=indices)
        cut = self._levels[last] < len(self.stages)
        if cut:
            self.stages = self.stages[: self._levels[last]]
            self._levels = self._levels[: last + 1]
            self.feature_info = self.feature_info[: last + 1]
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or cut:  # the classifier does not fit the features of an earlier stage
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the convolutions of the logits: two in train form, one in deploy form; Identity without classes."""
        if not self.num_classes:
            return nn.Identity()
        return self.cls[2] if self.deploy else (self.cls1[2], self.cls2[0])

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Build a new, initialized classifier for `num_classes`; 0 removes it. `global_pool` None keeps the pool."""
        if global_pool is None:
            global_pool = self.global_pool
        self.num_classes = num_classes
        weight = next(self.parameters())
        self._build_head(num_classes, global_pool, self.deploy, device=weight.device, dtype=weight.dtype)
        for module in (self.cls, self.cls1, self.cls2):
            if module is not None:
                module.apply(self._init_weights).train(self.training)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, mode: str = "full") -> None:
        """Keep fewer tensors for the backward pass and recompute the rest; `checkpointing` describes the modes."""
        self.grad_checkpointing, self.checkpoint_mode = enable, mode

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the groups for layer decay: the stem, each stage, the classifier; `coarse` makes no difference."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)", "head": r"^cls"}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return no names, because every optimizer set-up already spares biases and BatchNorms."""
        return set()


def _feature_levels(strides: Sequence[int]) -> tuple[int, ...]:
    """Positions (0: the stem, i: stage i) of the last layer at each resolution: (2, 2, 1) -> (0, 1, 3)."""
    return (*(i for i, stride in enumerate(strides) if stride > 1), len(strides))


def _adapt_pools(
    pools: Sequence[int], strides: Sequence[int], img_size: int | tuple[int, int], stem_stride: int, stem_padding: int
) -> tuple[int, ...]:
    """Adapt the pool sizes to another input size. The rule, ceil(size / stride), gives 38, 19, 10 at 224."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height != width:
        raise ValueError(f"adaptive pooling is square, img_size {height}x{width} is not")
    if height == 224:  # the input size that `pools` is for
        return tuple(pools)
    size, adapted = (height + 2 * stem_padding - 4) // stem_stride + 1, []
    for pool, stride in zip(pools, strides, strict=True):
        size = -(-size // stride)
        adapted.append(size if pool else 0)
    return tuple(adapted)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module, *, fuse: bool = False) -> dict[str, Any]:
    """Return the weights in a released checkpoint, without the classifier if the model has other classes.

    Also sets the model's lambda if the file records one. With other classes, timm drops the two convolutions named in
    `classifier`, but not the BatchNorm between them, and no longer loads strictly, so this function compares all names
    outside the classifier. With `fuse`, the model is to become a deploy form, and the file may hold either form.

    Raises:
        RuntimeError: names in the stem or the stages differ from the model's.
    """
    slope = float(state_dict.get("act_learn", model.act_learn))
    for key in ("model_ema", "model"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    if fuse and "stem.0.weight" in state_dict:
        model.switch_to_deploy()
    model.change_act(slope)
    own = model.state_dict()
    alien = sorted(name for name in own.keys() ^ state_dict.keys() if not name.startswith("cls"))
    if alien:
        raise RuntimeError(f"not the weights of this network: {len(alien)} names differ, among them {alien[:4]}")
    same_classes = model.num_classes == model.pretrained_cfg["num_classes"]
    return {name: value for name, value in state_dict.items() if same_classes or not name.startswith("cls")}


# -- variants, with dims in units of 128 * 4 channels (paper, table of architectures)

_UNIT = 128 * 4


def _variant(units: str, strides: str, width_mult: float = 1.0, ada_pool: Sequence[int] | None = None) -> dict:
    return {
        "dims": tuple(_UNIT * int(unit) for unit in units),
        "strides": tuple(int(stride) for stride in strides),
        "width_mult": width_mult,
        "ada_pool": ada_pool,
    }


VARIANTS = {
    "vanillanet_5": _variant("1248", "222"),
    "vanillanet_6": _variant("12488", "2221"),
    "vanillanet_7": _variant("112488", "12221"),
    "vanillanet_8": _variant("1124488", "122121"),
    "vanillanet_9": _variant("11244488", "1221121"),
    "vanillanet_10": _variant("112444488", "12211121"),
    "vanillanet_11": _variant("1124444488", "122111121"),
    "vanillanet_12": _variant("11244444488", "1221111121"),
    "vanillanet_13": _variant("112444444488", "12211111121"),
    "vanillanet_13_x1_5": _variant("112444444488", "12211111121", 1.5),
    "vanillanet_13_x1_5_ada_pool": _variant(
        "112444444488", "12211111121", 1.5, ada_pool=(0, 38, 19, 0, 0, 0, 0, 0, 0, 10, 0)
    ),
}


def _name_deployed_layers(model: nn.Module) -> None:
    """Tell timm the first convolution and the classifier of the deploy form. `model` is the network or a wrapper."""
    model._traits = {**getattr(model, "_traits", {}), "first_conv": "stem.0"}
    if cfg := getattr(model, "pretrained_cfg", None):
        layers = {"first_conv": "stem.0", "classifier": "cls.2"}
        model.pretrained_cfg = model.default_cfg = {**cfg, **{key: layers[key] for key in layers if key in cfg}}


def _cfg(variant: str, ada_pool: Sequence[int] | None) -> dict[str, Any]:
    return {
        "url": f"https://github.com/huawei-noah/VanillaNet/releases/download/ckpt/{variant}.pth",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (10, 10) if ada_pool else (7, 7),
        "fixed_input_size": bool(ada_pool),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem1.0",
        "classifier": ("cls1.2", "cls2.0"),
        "license": "mit",
        "paper_ids": "arXiv:2305.12972",
        "paper_name": "VanillaNet: the Power of Minimalism in Deep Learning",
        "origin_url": "https://github.com/huawei-noah/VanillaNet",
    }


default_cfgs = generate_default_cfgs(
    {f"{variant}.in1k": _cfg(variant, spec["ada_pool"]) for variant, spec in VARIANTS.items()}
)


def _create_vanillanet(variant: str, pretrained: bool = False, deploy: bool = False, **kwargs) -> VanillaNet:
    kwargs = dict(VARIANTS[variant], **kwargs)
    # The released weights are of the train form, so a pretrained deploy form is built and loaded as that, then fused.
    fuse = pretrained and deploy
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        model = build_model_with_cfg(
            VanillaNet,
            variant,
            pretrained=pretrained,
            pretrained_filter_fn=partial(checkpoint_filter_fn, fuse=fuse),
            feature_cfg={
                "out_indices": tuple(range(len(_feature_levels(kwargs["strides"])))),
                "feature_cls": "getter",
                "flatten_sequential": True,  # because feature_cls list and dict find only direct children
            },
            deploy=deploy and not fuse,
            **kwargs,
        )
    if fuse:
        network = getattr(model, "model", model)  # features_only wraps the network
        if not isinstance(network, VanillaNet):
            raise ValueError("features of a pretrained deploy form are there through feature_cls='getter' only")
        network.switch_to_deploy()
        if network.num_classes not in (0, network.pretrained_cfg["num_classes"]):
            network.reset_classifier(network.num_classes)  # merged, two fresh layers would be far too small
    if deploy:
        _name_deployed_layers(model)
    return model


@register_model
def vanillanet_5(pretrained: bool = False, **kwargs) -> VanillaNet:
    return _create_vanillanet("vanillanet_5", pretrained, **kwargs)


@register_model
def vanillanet_6(pretrained: bool = False, **kwargs) -> VanillaNet:
    return _create_vanillanet("vanillanet_6", pretrained, **kwargs)


@register_model
def vanillanet_7(pretrained: bool = False, **kwargs) -> VanillaNet:
    return _create_vanillanet("vanillanet_7", pretrained, **kwargs)


@register_model
def vanillanet_8(pretrained: bool = False, **kwargs) -> VanillaNet:
    return _create_vanillanet("vanillanet_8", pretrained, **kwargs)


@register_model
def vanillanet_9(pretrained: bool = False, **kwargs) -> VanillaNet:
    return _create_vanillanet("vanillanet_9", pretrained, **kwargs)


@register_model
def vanillanet_10(pretrained: bool = False, **kwargs) -> VanillaNet:
    return _create_vanillanet("vanillanet_10", pretrained, **kwargs)


@register_model
def vanillanet_11(pretrained: bool = False, **kwargs) -> VanillaNet:
    return _create_vanillanet("vanillanet_11", pretrained, **kwargs)


@register_model
def vanillanet_12(pretrained: bool = False, **kwargs) -> VanillaNet:
    return _create_vanillanet("vanillanet_12", pretrained, **kwargs)


@register_model
def vanillanet_13(pretrained: bool = False, **kwargs) -> VanillaNet:
    return _create_vanillanet("vanillanet_13", pretrained, **kwargs)


@register_model
def vanillanet_13_x1_5(pretrained: bool = False, **kwargs) -> VanillaNet:
    return _create_vanillanet("vanillanet_13_x1_5", pretrained, **kwargs)


@register_model
def vanillanet_13_x1_5_ada_pool(pretrained: bool = False, **kwargs) -> VanillaNet:
    return _create_vanillanet("vanillanet_13_x1_5_ada_pool", pretrained, **kwargs)
