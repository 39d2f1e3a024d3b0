"""Entry points for torch.hub: `torch.hub.load("DIR_OR_REPOSITORY", "vanillanet_9", source="local")`.

Each takes the keyword arguments of `timm.create_model` and of `models.VanillaNet`: `pretrained=True` loads the released
weights or raises, `deploy=True` gives the fused form, and `num_classes`, `in_chans`, `features_only`, ... are timm's.

The calling program may have its own package `models`. The folder models/ is therefore loaded under a unique name, and
`sys.path` is not changed.
"""

import hashlib
import importlib.util
import pathlib
import sys
import types

dependencies = ["torch", "timm", "einops"]

_INIT = pathlib.Path(__file__).resolve().parent / "models" / "__init__.py"
_NAME = f"vanillanet_{hashlib.sha256(bytes(_INIT)).hexdigest()[:8]}"  # unique for each copy of the repository


def _load() -> types.ModuleType:
    """Return the folder models/ as a package, always the same one for this copy of the repository."""
    imported = sys.modules.get("models")
    if getattr(imported, "__file__", None) == str(_INIT):
        return imported
    if _NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(_NAME, _INIT)
        sys.modules[_NAME] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[_NAME])
        except BaseException:  # a package that is missing, and may be there at the next try
            del sys.modules[_NAME]
            raise
    return sys.modules[_NAME]


_package = _load()
globals().update({name: getattr(_package, name) for name in _package.vanillanet.VARIANTS})  # where torch.hub looks
