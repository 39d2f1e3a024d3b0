"""What the tests share."""

import logging
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import utils
from harness import Server
from runs import cut_fmnist

# Files of which a test takes long, from the longest on. They are begun first, since a long one that is begun last runs
# alone while the other processes have nothing left to do.
LONGEST = (
    "test_checkpointing.py", "test_benchmark.py", "test_main.py", "test_runtimes.py", "test_timm.py", "test_predict.py",
    "test_signals.py", "test_detection_runs.py", "test_kills.py", "test_saves.py", "test_ablation.py", "test_resume.py",
    "test_detectors.py", "test_loaders.py", "test_distributed.py", "test_own_data.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reliability", metavar="FILE", help="run the fault suite in its thorough form and write its table to FILE"
    )


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _restore_signals():
    """A run in this process answers signals in its own way."""
    before = {number: signal.getsignal(number) for number in utils.StopRequest.signals}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _restore_logging():
    """A run in this process logs to the standard error of its test, which is closed afterwards."""
    yield
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny_fmnist(tmp_path_factory):
    """60 training and 40 test images of the embedded data, in the same format."""
    return cut_fmnist(tmp_path_factory.mktemp("fmnist"), train=60, test=40)


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """Starts processes that have their imports already."""
    with Server(tmp_path_factory.mktemp("processes")) as started:
        yield started


@pytest.fixture(scope="session")
def randomized() -> Callable[[nn.Module], nn.Module]:
    """A function that gives a network BatchNorms as after training, in place, and returns it in eval mode.

    Fresh statistics make folding trivial. The convolutions get weights that keep activations near 1 through all
    layers, so that the logits depend on the image and a wrong fusion shows.
    """

    @torch.no_grad()
    def randomize(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(std=(2 / module.weight[0].numel()) ** 0.5)
                if module.bias is not None:
                    module.bias.normal_(std=0.2)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
                module.num_batches_tracked.fill_(7)
        return model.eval()

    return randomize


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def dispatched() -> Callable[[nn.Module, torch.Tensor], list[str]]:
    """A function that lists the operators of one forward pass."""

    @torch.no_grad()
    def record(model: nn.Module, images: torch.Tensor) -> list[str]:
        with _Recorder() as recorder:
            model(images)
        return recorder.names

    return record


# -- checkpoints as runs leave them, and as they should not be


@pytest.fixture(scope="session")
def recorded() -> Callable[..., dict]:
    """A function that gives the arguments that a run of main.py records, as far as deploying reads them."""

    def record(**args):
        return {
            "model": "vanillanet_6", "data_set": "FMNIST", "input_size": 32, "crop_pct": None,
            "imagenet_default_mean_and_std": True, **args,
        }  # fmt: skip

    return record


class _Payload:
    """What a pickle could do when it is loaded: leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def hostile(recorded, tmp_path) -> Callable[..., Path]:
    """A function that writes a checkpoint whose loading would leave the file `harm` beside it."""

    def write(*, pickled: bool = False) -> Path:
        checkpoint = {"model": {}, "args": recorded(), "payload": _Payload(tmp_path / "harm")}
        path = tmp_path / "hostile.pth"
        if pickled:
            path.write_bytes(pickle.dumps(checkpoint, protocol=2))
        else:
            torch.save(checkpoint, path)
        return path

    return write
