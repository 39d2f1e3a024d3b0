"""Compare training's input pipeline with timm's: images/s of both, measured by turns, and the time of each stage.

Both read the same files with the same augmentation, batch size and number of loader processes. timm's is that of its
`train.py`: `create_loader` with its prefetcher, which gets bytes from loader processes and normalizes on the device.
"""

import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset as TimmImageDataset
from timm.data import create_loader

from benchmarking import results
from datasets import ImageDataset
from loading.images import BrokenImageError, decode_for_training, list_images
from loading.loaders import build_train_loader
from loading.order import kept_random_states, seed_all
from loading.processes import Loading
from loading.transforms import Preprocessing, build_train_transform
from loading.views import TrainTransform, Views, stack_views
from utils import keep_freed_memory

COLUMNS = (
    "loader", "stage", "ms_per_image", "images_per_s", "ratio", "images", "batch", "workers", "resolution",
    "processor", "threads", "torch", "library", "date",
)  # fmt: skip
AUGMENTATION = {"aa": "rand-m7-mstd0.5-inc1", "interpolation": "bicubic", "reprob": 0.25, "remode": "pixel"}
TURN = 3000  # images per turn, so many that its start and end, when loader processes are idle, weigh little
TIMED = 200  # images whose stages are timed
TURNS = 4


class _Files(ImageDataset):
    """Image files, all of class 0."""

    classes = None

    def __init__(self, paths: Sequence[str], transform: TrainTransform):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self, index: int) -> str:
        return self.paths[index]

    def load(self, index: int) -> tuple[Image.Image, int]:
        return decode_for_training(self.paths[index]), 0


def _readable(paths: Sequence[str]) -> Iterator[str]:
    """Yield the files that can be decoded; each loader would replace broken ones with different images."""
    for path in paths:
        try:
            decode_for_training(path)
        except BrokenImageError:
            continue
        yield path


def _timms(paths: Sequence[str], preprocessing: Preprocessing, loading: Loading) -> Any:
    return create_loader(
        dataset=TimmImageDataset(root="", reader=[(path, 0) for path in paths]),
        input_size=(3, preprocessing.input_size, preprocessing.input_size),
        batch_size=loading.batch_size,
        is_training=True,
        use_prefetcher=True,
        auto_augment=AUGMENTATION["aa"],
        interpolation=AUGMENTATION["interpolation"],
        re_prob=AUGMENTATION["reprob"],
        re_mode=AUGMENTATION["remode"],
        mean=preprocessing.mean,
        std=preprocessing.std,
        num_workers=loading.num_workers,
        pin_memory=loading.pin_memory,
        device=loading.device,
        persistent_workers=loading.num_workers > 0,
    )


def _seconds(loader: Any) -> float:
    """Return the seconds per image over an epoch."""
    begin, count = time.perf_counter(), 0
    for images, _ in loader:
        count += len(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def _time_stages(
    paths: Sequence[str], decode: Callable[[str], Any], stages: Sequence[Callable], finish: Callable
) -> dict[str, float]:
    """Return the milliseconds per image in each stage, as CPU time of this process."""
    spent: dict[str, float] = {}
    done = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    with kept_random_states():
        for index, path in enumerate(paths):
            seed_all(0, index)
            value: Any = path
            for stage in (decode, *stages):
                name = getattr(stage, "__name__", type(stage).__name__).strip("_").replace("_", " ")
                begin = time.process_time()
                value = stage(value)
                spent[name] = spent.get(name, 0.0) + time.process_time() - begin
            done.append(value)
        finish(done)  # not timed: the first call takes memory from the system
        begin = time.process_time()
        finish(done)
        spent["batch, normalized and erased"] = time.process_time() - begin
    torch.set_num_threads(threads)
    return {name: 1e3 * seconds / len(paths) for name, seconds in spent.items()}


def _own_stages(paths: Sequence[str], transform: TrainTransform, device: torch.device) -> dict[str, float]:
    views = TrainTransform([], erase=transform.erase, mean=transform.mean, std=transform.std)

    def to_bytes(image: Image.Image) -> Views:
        return views.view(image)

    def finish(done: list[Views]) -> None:
        transform.finish(stack_views(torch.cat([view.pixels for view in done]), done), device)

    return _time_stages(paths, decode_for_training, [*transform.transforms, to_bytes], finish)


def _timms_stages(paths: Sequence[str], loader: Any) -> dict[str, float]:
    def decode(path: str) -> Image.Image:
        return Image.open(path).convert("RGB")

    def finish(done: list[torch.Tensor]) -> None:
        pixels = torch.from_numpy(np.stack(done)).to(loader.device, dtype=torch.float32)
        pixels.sub_(loader.mean).div_(loader.std)
        if loader.random_erasing is not None:
            loader.random_erasing(pixels)

    return _time_stages(paths, decode, loader.dataset.transform.transforms, finish)


def measure(
    folder: Path, *, resolution: int, batch: int, workers: int, device: torch.device, threads: int
) -> list[dict[str, Any]]:
    """Measure both loaders; return one row for each as a whole, and one for each of its stages.

    Args:
        folder: up to `TURN` images are read from it and its subfolders; fewer are read several times in a turn.
        threads: threads of this process, as a condition in the rows.

    Raises:
        ValueError: fewer images than a batch can be read.
    """
    paths = list(_readable(list_images([str(folder)])[:TURN]))
    if len(paths) < batch:
        raise ValueError(f"--loading true needs a batch of images: {folder} has {len(paths)}, --batch_size is {batch}")
    some, found = paths[:: -(-len(paths) // TIMED)], len(paths)
    paths = (paths * -(-TURN // len(paths)))[: max(1, TURN // batch) * batch]
    keep_freed_memory()  # as training does
    preprocessing = Preprocessing(resolution)
    loading = Loading(batch, num_workers=workers, pin_memory=device.type == "cuda", device=device)
    transform = build_train_transform(preprocessing, **AUGMENTATION)
    own, timms = build_train_loader(_Files(paths, transform), loading), _timms(paths, preprocessing, loading)
    speeds: dict[str, list[float]] = {"ours": [], "timm": []}
    for turn in range(TURNS + 1):
        for name, loader in (("ours", own), ("timm", timms))[:: 1 if turn % 2 else -1]:
            if name == "ours":
                loader.set_epoch(turn)
            seconds = _seconds(loader)
            if turn:  # the first turn starts the loader processes
                speeds[name].append(seconds)
    ratio = statistics.median(speeds["timm"]) / statistics.median(speeds["ours"])
    stages = {"ours": _own_stages(some, transform, device), "timm": _timms_stages(some, timms)}
    shared = {
        "images": found, "batch": batch, "workers": workers, "resolution": resolution,
        **results.conditions("", device=str(device), threads=threads),
    }  # fmt: skip
    rows = []
    for name, seconds in speeds.items():
        median = statistics.median(seconds)
        whole = {"stage": "all", "ms_per_image": 1e3 * median, "images_per_s": 1 / median}
        whole["ratio"] = ratio if name == "ours" else 1.0
        each = [{"stage": stage, "ms_per_image": ms} for stage, ms in stages[name].items()]
        library = f"timm {importlib.metadata.version('timm')}" if name == "timm" else shared["library"]
        rows += [{"loader": name, **row, **shared, "library": library} for row in (whole, *each)]
    return rows
