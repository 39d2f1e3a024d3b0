"""Entry points for torch.hub: `torch.hub.load("DIR_OR_REPOSITORY", "vanillanet_9", source="local")`.

Each takes the keyword arguments of `timm.create_model` and of `models.VanillaNet`: `pretrained=True` loads the released
weights or raises, `deploy=True` gives the fused form, and `num_classes`, `in_chans`, `features_only`, ... are timm's.

The calling program may have its own package `models`. The folder models/ is therefore loaded under a unique name, which
is removed from `sys.modules` afterwards, and `sys.path` is not changed.
"""

import hashlib
import importlib.util
import pathlib
import sys
import types

dependencies = ["torch", "timm", "einops"]

_INIT = pathlib.Path(__file__).resolve().parent / "models" / "__init__.py"
_NAME = f"vanillanet_{hashlib.sha256(bytes(_INIT)).hexdigest()[:8]}"  # unique for each copy of the repository


class _Finder:
    """Lets the import system find the loaded modules again, because pickle and torch.compile import them by name."""

    def __init__(self, modules: dict[str, types.ModuleType]):
        self.modules = modules

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.modules else None

    def create_module(self, spec):
        return self.modules[spec.name]

    def exec_module(self, module):
        """Do nothing: the module was executed when it was loaded."""


def _load() -> types.ModuleType:
    """Return the folder models/ as a package, always the same one for this copy of the repository."""
    imported = sys.modules.get("models")
    if getattr(imported, "__file__", None) == str(_INIT):
        return imported
    before = set(sys.modules)
    try:
        if importlib.util.find_spec(_NAME):
            return importlib.import_module(_NAME)
        spec = importlib.util.spec_from_file_location(_NAME, _INIT)
        package = sys.modules[_NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    finally:
        added = {name for name in set(sys.modules) - before if name.partition(".")[0] == _NAME}
        modules = {name: sys.modules.pop(name) for name in added}
    sys.meta_path.insert(0, _Finder(modules))
    return package


_package = _load()
globals().update({name: getattr(_package, name) for name in _package.vanillanet.VARIANTS})  # where torch.hub looks
