"""VanillaNet. Importing this package registers the variants with timm (`timm.create_model("vanillanet_9")`)."""

from . import vanillanet
from .fusion import fold_bn, merge_pointwise
from .vanillanet import *  # noqa: F403  entry points are published as `models.vanillanet_9`

__all__ = [*vanillanet.__all__, "fold_bn", "merge_pointwise"]
