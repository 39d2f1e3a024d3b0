"""Entry points for torch.hub: `torch.hub.load("DIR_OR_REPOSITORY", "vanillanet_9", source="local")`.

Each takes the keyword arguments of `timm.create_model` and of `models.VanillaNet`: `pretrained=True` loads the released
weights or raises, `deploy=True` gives the fused form, and `num_classes`, `in_chans`, `features_only`, ... are timm's.
"""

from models.vanillanet import (  # noqa: F401  torch.hub finds the entry points among this module's names
    vanillanet_5,
    vanillanet_6,
    vanillanet_7,
    vanillanet_8,
    vanillanet_9,
    vanillanet_10,
    vanillanet_11,
    vanillanet_12,
    vanillanet_13,
    vanillanet_13_x1_5,
    vanillanet_13_x1_5_ada_pool,
)

dependencies = ["torch", "timm", "einops"]
