"""VanillaNet. Importing this package registers the variants with timm (`timm.create_model("vanillanet_9")`)."""

from . import vanillanet
from .fusion import fold_bn, merge_pointwise
from .vanillanet import *  # noqa: F403  the published way to reach an entry point is `models.vanillanet_9`

__all__ = [*vanillanet.__all__, "fold_bn", "merge_pointwise"]
