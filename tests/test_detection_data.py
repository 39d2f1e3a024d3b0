"""Data in COCO's format with its quirks, AP against pycocotools and by hand, the made data set, pictures."""

import contextlib
import copy
import io
import json
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from loading import loaders
from loading.images import BrokenImageError
from loading.processes import Loading
from object_detection import make_garments
from object_detection.coco import CocoDataset, collate, encode_segment, read_annotations
from object_detection.draw import colour, draw_detections, draw_images, save_picture
from object_detection.evaluation import STATISTICS, average_precision, to_results

SIZE = {"height": 40, "width": 60}


def square(x, y, w, h):
    """As a polygon."""
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def grid(x, y, w, h):
    """As pixels, (40, 60)."""
    mask = np.zeros((40, 60), np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def compressed(mask):
    rle = mask_utils.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def uncompressed(mask):
    """Lengths of runs of 0 and 1 by turns, column by column."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": [40, 60], "counts": ([0] if flat[0] else []) + counts}


def quirks():
    """Seven images: what each has is in its file's name."""
    names = ["polygon", "compressed", "uncompressed", "crowd", "empty", "degenerate", "mixed"]
    crowd = {"iscrowd": 1, "segmentation": uncompressed(grid(0, 0, 30, 30)), "bbox": [0, 0, 30, 30]}
    objects = [
        (1, 7, {"bbox": [10, 5, 20, 10], "segmentation": square(10, 5, 20, 10)}),
        (2, 90, {"bbox": [10, 5, 20, 10], "segmentation": compressed(grid(10, 5, 20, 10))}),
        (3, 7, {"bbox": [10, 5, 20, 10], "segmentation": uncompressed(grid(10, 5, 20, 10))}),
        (4, 7, crowd),
        (6, 7, {"bbox": [10, 5, 0, 10], "segmentation": square(10, 5, 1, 10)}),
        (7, 90, {"bbox": [-5, 30, 25, 30], "segmentation": square(0, 30, 20, 10)}),  # reaches over the border
        (7, 7, {"bbox": [30, 5, 8, 8], "segmentation": [[30, 5, 38, 13]]}),  # two points are no polygon
        (7, 7, {"bbox": [30, 5, 8, 8]}),
        (7, 7, crowd),
    ]
    return {
        "images": [{"id": i, "file_name": f"{name}.png", **SIZE} for i, name in enumerate(names, 1)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, **rest}
            for i, (image, category, rest) in enumerate(objects)
        ],
        "categories": [{"id": 90, "name": "ninety"}, {"id": 7, "name": "seven"}, {"id": 8, "name": "unused"}],
    }


def write(folder, data):
    (folder / "images").mkdir(exist_ok=True)
    for image in data["images"]:
        Image.new("RGB", (60, 40), (200, 100, 50)).save(folder / "images" / image["file_name"])
    (folder / "a.json").write_text(json.dumps(data))
    return folder / "a.json", folder / "images"


# -- the data set


def test_the_quirks_of_the_format(tmp_path, caplog):
    data = CocoDataset(*write(tmp_path, quirks()), train=True, masks=True, flip=0)
    # An image with a crowd only, or with objects none of which can be learned, has no background to learn from.
    assert [x["file_name"] for x in data.images] == [
        f"{name}.png" for name in ("polygon", "compressed", "uncompressed", "empty", "mixed")
    ]
    assert data.classes == ("seven", "unused", "ninety")
    assert data.category_ids == [7, 8, 90]
    assert "3 objects without area" in caplog.text
    items = [data[i][1] for i in range(5)]
    for item in items[:3]:
        assert item["boxes"].tolist() == [[10, 5, 30, 15]]
        assert np.array_equal(item["masks"][0].numpy(), grid(10, 5, 20, 10))
    assert [item["labels"].tolist() for item in items] == [[1], [3], [1], [], [3]]
    assert (items[3]["boxes"].shape, items[3]["masks"].shape) == ((0, 4), (0, 40, 60))
    assert items[4]["boxes"].tolist() == [[0, 30, 20, 40]]  # cut at the border
    evaluated = CocoDataset(*write(tmp_path, quirks()), train=False, masks=True)
    assert len(evaluated) == 7  # nothing is left out
    boxes_only = CocoDataset(*write(tmp_path, quirks()), train=True, masks=False)
    assert len(boxes_only[4][1]["boxes"]) == 3  # a box without a segment can be learned by a RetinaNet


def test_flipping(tmp_path):
    data = CocoDataset(*write(tmp_path, quirks()), train=True, masks=True, flip=1)
    plain = CocoDataset(*write(tmp_path, quirks()), train=False, masks=True, flip=1)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    image, target = data.apply(picture, plain.load(0)[1])
    straight, before = plain.apply(picture, plain.load(0)[1])  # never in evaluation
    assert torch.equal(image, straight.flip(-1))
    assert before["boxes"].tolist() == [[10, 5, 30, 15]]
    assert target["boxes"].tolist() == [[30, 5, 50, 15]]
    assert np.array_equal(target["masks"][0].numpy(), grid(30, 5, 20, 10))
    assert {type(value) for value in (image, *target.values())} == {torch.Tensor}


def test_loaders_keep_images_of_different_sizes_apart(tmp_path):
    data = CocoDataset(*write(tmp_path, quirks()), train=True, masks=True)
    loading = Loading(batch_size=3, collate=collate)
    train = loaders.build_train_loader(data, loading)
    images, targets = next(iter(train))
    assert [tuple(image.shape) for image in images] == [(3, 40, 60)] * 3
    assert all(set(target) == {"boxes", "labels", "masks"} for target in targets)
    again = next(iter(loaders.build_train_loader(data, loading)))
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, again[1], strict=True))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.pop("categories"), "no list of categories"),
        (lambda d: d["annotations"][2].pop("bbox"), r"annotations\[2\] has no bbox"),
        (lambda d: d["annotations"][0].update(category_id=5), "category_id 5, which is none of the categories"),
        (lambda d: d["annotations"][0].update(image_id=50), "image_id 50, which is none of the images"),
        (lambda d: d["annotations"][0].update(id=1), "two of the annotations have the id 1"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), r"bbox of annotation 0 is not \[x, y, width, height\]"),
        (lambda d: d["annotations"][1]["segmentation"].update(size=[9, 9]), "segment of annotation 1: its RLE is of"),
        (
            lambda d: d["images"][0].update(file_name="gone.png"),
            r"1 images of .*a.json are not in .* gone.png",
        ),
        (lambda d: d["images"][0].update(file_name="no/such.png"), "cannot read the image folder"),
        (lambda d: [a.pop("segmentation", None) for a in d["annotations"]], "use a RetinaNet"),
        (lambda d: [a.update(segmentation=[]) for a in d["annotations"]], "use a RetinaNet"),
        (lambda d: [a.update(segmentation=None) for a in d["annotations"]], "use a RetinaNet"),
        (lambda d: [d["images"].clear(), d["annotations"].clear()], "has no image"),
        (lambda d: d["images"][0].update(width="60"), r"width of images\[0\] must be a whole number, not '60'"),
        (lambda d: d["images"][0].update(height=None), r"height of images\[0\] must be a whole number, not None"),
        (lambda d: d["images"][0].update(file_name=5), r"file_name of images\[0\] must be a text, not 5"),
        (lambda d: d["images"][0].update(id="1"), "some ids of images are numbers and some are texts"),
        (lambda d: d["images"][0].update(id=[1]), r"id of images\[0\] must be a whole number or a text, not \[1\]"),
        (lambda d: d["categories"][0].update(id=None), r"id of categories\[0\] must be"),
        (lambda d: d["categories"][0].update(id="90"), "some ids of categories are numbers and some are texts"),
        (lambda d: d["annotations"][0].update(id="x"), "some ids of annotations are numbers and some are texts"),
        (lambda d: d["annotations"][0].update(image_id="1"), "image_id '1', which is none of the images"),
        (lambda d: d["annotations"][0].update(category_id={}), r"category_id of annotations\[0\] must be"),
        (lambda d: d["annotations"][0].update(bbox=["1", 2, 3, 4]), r"bbox of annotation 0 is not \[x, y"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), r"bbox of annotation 0 is not \[x, y"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, float("inf"), 4]), r"bbox of annotation 0 is not \[x, y"),
        (lambda d: d["annotations"][0].update(bbox=[10**400, 2, 3, 4]), r"bbox of annotation 0 is not \[x, y"),
        (lambda d: d["annotations"][0].update(bbox=None), r"bbox of annotations\[0\] must be \[x, y, width, height\]"),
        (lambda d: d["annotations"][0].update(area="200"), "area of annotation 0 must be a number, not '200'"),
        (lambda d: d["annotations"][0].update(iscrowd=-1), "iscrowd of annotation 0 must be 0 or 1, not -1"),
        (lambda d: d["annotations"][0].update(iscrowd="0"), "iscrowd of annotation 0 must be a number, not '0'"),
        (
            lambda d: d["annotations"][0].update(segmentation=[[float("nan")] * 6]),
            "annotation 0: a corner is not a number",
        ),
        (lambda d: d["annotations"][0].update(segmentation=[[0, 0, 1e300, 0, 9, 9]]), "annotation 0: a corner is"),
        (lambda d: d["annotations"][0].update(segmentation=[["x"] * 6]), "cannot read the segment of annotation 0"),
        (lambda d: d["annotations"][2]["segmentation"].update(counts=[10, 20]), "annotation 2: its RLE is of 30 px"),
        (lambda d: d["annotations"][3]["segmentation"].update(counts=[-1, 2401]), "the segment of annotation 3"),
        (lambda d: d["annotations"][1]["segmentation"].update(counts="garbage!"), "the segment of annotation 1"),
    ],
)
def test_broken_annotations(tmp_path, spoil, message):
    file, images = write(tmp_path, quirks())
    data = quirks()
    spoil(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        CocoDataset(file, images, train=True, masks=True)


def test_values_that_are_absent_in_effect(tmp_path):
    """Null is absent; whole numbers may be floats, as pandas writes them; one polygon need not be in a list."""
    expected = CocoDataset(*write(tmp_path, quirks()), train=False, masks=True)
    data = quirks()
    for row in data["annotations"]:
        row.setdefault("iscrowd", None)
        row.update(area=None, image_id=float(row["image_id"]), category_id=float(row["category_id"]))
        if isinstance(row.get("segmentation"), list) and len(row["segmentation"]) == 1:
            [row["segmentation"]] = row["segmentation"]
        row.setdefault("segmentation", None)
    for row in data["images"]:
        row.update(width=60.0, height=40.0)
    found = CocoDataset(*write(tmp_path, data), train=False, masks=True)
    assert found.data["annotations"][0]["area"] == 200
    for index in range(len(expected)):
        a, b = expected[index][1], found[index][1]
        assert all(torch.equal(a[key], b[key]) for key in ("boxes", "labels", "masks"))
    truth = average_precision(expected.data, [], masks=True)
    assert average_precision(found.data, [], masks=True) == truth


@pytest.mark.parametrize(
    "box",
    [
        [-0.3, 10, 0.30000000000000004, 20],
        [59.999999, 10, 5, 20],
        [10, 5, 1e-7, 20],
        [10, 39.9999999, 5, 5],
        [70, 10, 5, 20],
        [10, 5, -3, 20],
    ],
)
def test_a_box_with_nothing_left_is_left_out(tmp_path, box, caplog):
    data = quirks()
    data["annotations"][0]["bbox"] = box
    found = CocoDataset(*write(tmp_path, data), train=True, masks=False, flip=1)
    assert "4 objects without area" not in caplog.text
    assert "polygon.png" not in [x["file_name"] for x in found.images]
    boxes = torch.cat([found[index][1]["boxes"] for index in range(len(found))])
    assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_annotations_in_any_utf(tmp_path, encoding):
    file, _ = write(tmp_path, quirks())
    expected = read_annotations(file)
    file.write_bytes(file.read_text().encode(encoding))
    assert read_annotations(file) == expected


def test_broken_files(tmp_path):
    file, images = write(tmp_path, quirks())
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json is no JSON"):
        read_annotations(tmp_path / "deep.json")
    with pytest.raises(ValueError, match=r"gone\.json does not exist"):
        read_annotations(tmp_path / "gone.json")
    (tmp_path / "cut.json").write_text(file.read_text()[:-100])
    with pytest.raises(ValueError, match=r"cut\.json is no JSON"):
        read_annotations(tmp_path / "cut.json")
    Image.new("RGB", (40, 60)).save(images / "polygon.png")
    with pytest.raises(BrokenImageError, match="it has 40x60 px, the annotations say 60x40"):
        CocoDataset(file, images, train=False, masks=True).load(0)


def test_boxes_alone_need_no_pycocotools(tmp_path, monkeypatch):
    for name in ("pycocotools", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, name, None)
    file, images = write(tmp_path, quirks())
    assert CocoDataset(file, images, train=True, masks=False).load(0)[1].keys() == {"boxes", "labels"}
    with pytest.raises(ImportError):
        CocoDataset(file, images, train=True, masks=True)


@pytest.mark.parametrize(("size", "accepted"), [((2, 401), False), ((1340, 1), False), ((2, 400), True)])
def test_an_image_with_too_long_a_side_is_broken(tmp_path, size, accepted):
    """torchvision's detectors would resize it to a side of no pixel."""
    file, images = write(tmp_path, quirks())
    data = json.loads(file.read_text())
    data["annotations"], (width, height) = [], size
    data["images"][0] |= {"width": width, "height": height}
    file.write_text(json.dumps(data))
    Image.new("RGB", size).save(images / data["images"][0]["file_name"])
    dataset, drawn = CocoDataset(file, images, train=False, masks=True), []

    class Detector(torch.nn.Linear):
        def forward(self, images):
            drawn.extend(images)
            return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}]

    picture = torch.zeros(3, height, width)
    with (
        contextlib.nullcontext() if accepted else pytest.raises(BrokenImageError, match="more than 200 times the other")
    ):
        assert dataset.load(0)[0].size == size
    with contextlib.nullcontext() if accepted else pytest.raises(ValueError, match=f"cannot take an image of {width}x"):
        draw_images(Detector(1, 1), [picture], tmp_path / "x.png", classes=["a"], threshold=0.5)
    assert len(drawn) == accepted


# -- AP


def own_ap(data, results, kind):
    """What pycocotools finds, used as its own demonstration does."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(data)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STATISTICS, evaluation.stats[:6].tolist(), strict=True))


def scattered(draw, objects):
    """Annotations, and results near them, beside them and of other categories."""
    data = {
        "images": [{"id": 10 * i, "file_name": "", "height": 200, "width": 200} for i in range(1, 7)],
        "categories": [{"id": i, "name": str(i)} for i in (2, 5)],
        "annotations": [],
    }
    results = []
    for number in range(1, objects + 1):
        w, h = draw.randint(10, 120), draw.randint(10, 120)
        box = [draw.randint(0, 200 - w), draw.randint(0, 200 - h), w, h]
        image, category = draw.choice(data["images"])["id"], draw.choice((2, 5))
        mask = np.zeros((200, 200), np.uint8)
        mask[box[1] : box[1] + h, box[0] : box[0] + w] = 1
        row = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": w * h}
        data["annotations"].append(row | {"iscrowd": int(number % 9 == 0), "segmentation": compressed(mask)})
        for _ in range(draw.randint(0, 2)):
            x, y = (max(0, c + draw.randint(-6, 6)) for c in box[:2])
            moved = np.zeros((200, 200), np.uint8)
            moved[y : y + h, x : x + w] = 1
            results.append(
                {"image_id": image, "category_id": draw.choice((category, 2)), "bbox": [x, y, w, h],
                 "score": draw.random(), "segmentation": compressed(moved)}
            )  # fmt: skip
    return data, results


def test_ap_is_pycocotools():
    data, results = scattered(random.Random(0), 60)
    found = average_precision(data, results, masks=True)
    boxes = own_ap(data, results, "bbox")
    assert 0.1 < boxes["AP"] < 0.9
    assert {f"box_{name}": value for name, value in boxes.items()} == {
        name: value for name, value in found.items() if name.startswith("box")
    }
    # pycocotools takes the size of a mask from its box if there is one; of a mask alone, from the mask.
    alone = [{key: value for key, value in row.items() if key != "bbox"} for row in results]
    assert {f"mask_{name}": value for name, value in own_ap(data, alone, "segm").items()} == {
        name: value for name, value in found.items() if name.startswith("mask")
    }
    shuffled = random.Random(1).sample(results, len(results))
    assert average_precision(data, shuffled, masks=True) == found
    assert "mask_AP" not in average_precision(data, results, masks=False)


@pytest.mark.parametrize(
    ("boxes", "ap", "ap50"),
    [
        ([(0, 0.9)], 1.0, 1.0),
        ([], 0.0, 0.0),
        ([(60, 0.9), (0, 0.8)], 0.5, 0.5),  # a wrong one before the right one: precision 1/2 at all recalls
        ([(0, 0.9), (60, 0.8)], 1.0, 1.0),  # after it, it costs nothing
        ([(0, 0.9), (0, 0.8)], 1.0, 1.0),
        ([(25, 0.9)], 0.3, 1.0),  # IoU 75 / 125 = 0.6: right at three of the ten thresholds
    ],
)
def test_ap_by_hand(boxes, ap, ap50):
    """One object of 100 x 10 px; each result is moved along x by so much, with such a score."""
    data = {
        "images": [{"id": 1, "file_name": "", "height": 200, "width": 200}],
        "categories": [{"id": 3, "name": "x"}],
        "annotations": [
            {"id": 0, "image_id": 1, "category_id": 3, "bbox": [0, 0, 100, 10], "area": 1000, "iscrowd": 0}
        ],
    }
    results = [{"image_id": 1, "category_id": 3, "bbox": [x, 0, 100, 10], "score": score} for x, score in boxes]
    found = average_precision(data, results, masks=False)
    assert found["box_AP"] == pytest.approx(ap, abs=1e-12)
    assert found["box_AP50"] == pytest.approx(ap50, abs=1e-12)
    assert "box_APl" not in found  # there is no large object


def test_half_of_the_objects():
    """With one of two objects found, precision is 1 up to recall 1/2: 51 of the 101 recalls."""
    data, _ = scattered(random.Random(0), 0)
    data["annotations"] = [
        {"id": i, "image_id": 10, "category_id": 2, "bbox": [90 * i, 0, 50, 50], "area": 2500, "iscrowd": 0}
        for i in range(2)
    ]
    results = [{"image_id": 10, "category_id": 2, "bbox": [90, 0, 50, 50], "score": 0.9}]
    assert average_precision(data, results, masks=False)["box_AP"] == pytest.approx(51 / 101)


def test_a_segment_without_a_pixel_is_an_object_to_find():
    """As for pycocotools: with one of two found, precision is 1 up to recall 1/2."""
    data, _ = scattered(random.Random(0), 0)
    segments = [square(0, 0, 50, 50), [[90.1, 0.1, 90.4, 0.1, 90.4, 0.4, 90.1, 0.4]]]
    data["annotations"] = [
        {"id": i, "image_id": 10, "category_id": 2, "bbox": [90 * i, 0, 50, 50], "area": 2500, "iscrowd": 0,
         "segmentation": segment}
        for i, segment in enumerate(segments)
    ]  # fmt: skip
    height, width = next((image["height"], image["width"]) for image in data["images"] if image["id"] == 10)
    found, empty = (encode_segment(segment, height, width) for segment in segments)
    assert mask_utils.area(empty) == 0
    results = [{"image_id": 10, "category_id": 2, "bbox": [0, 0, 50, 50], "score": 0.9, "segmentation": found}]
    assert average_precision(data, results, masks=True)["mask_AP"] == pytest.approx(51 / 101)


def test_quirks_in_evaluation(tmp_path, caplog):
    """Crowds are ignored, ids may begin at 0, annotations without a segment are left out of mask AP only."""
    data = read_annotations(write(tmp_path, quirks())[0])
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9,
         "segmentation": encode_segment(a.get("segmentation"), 40, 60) or compressed(grid(0, 0, 1, 1))}
        for a in data["annotations"] if not a["iscrowd"]
    ]  # fmt: skip
    within_crowd = {"image_id": 4, "category_id": 7, "bbox": [2, 2, 9, 9], "score": 0.99}
    perfect.append(within_crowd | {"segmentation": compressed(grid(2, 2, 9, 9))})
    found = average_precision(data, perfect, masks=True)
    assert found["mask_AP"] == 1.0
    # Of category 7 the box without area is not found: 4 of 5 are, and what was given for it is the third of 5 results.
    # So precision is 1 up to recall 0.4, then 4/5 up to 0.8. Of category 90 both are found.
    assert found["box_AP"] == pytest.approx(((41 + 40 * 4 / 5) / 101 + 1) / 2)
    assert "2 annotations without a segment" in caplog.text


def test_detections_become_results():
    masks = torch.zeros(1, 1, 40, 60)
    masks[0, 0, 5:15, 10:30] = 0.51
    masks[0, 0, 20:, :] = 0.49
    detection = {
        "boxes": torch.tensor([[10.0, 5.0, 30.0, 15.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.75]),
        "masks": masks,
    }
    [row] = to_results(detection, image_id=4, category_ids=[7, 90])
    segment = row.pop("segmentation")
    assert row == {"image_id": 4, "category_id": 90, "bbox": [10, 5, 20, 10], "score": 0.75}
    assert np.array_equal(mask_utils.decode(segment), grid(10, 5, 20, 10))


# -- the made data set


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("garments")
    make_garments.main([str(folder), "--train", "40", "--val", "3", "--side", "96"])
    return folder


def test_garments(made, tmp_path):
    data = read_annotations(made / "train.json")
    assert len(data["images"]) == 40
    assert {c["id"]: c["name"] for c in data["categories"]} == {
        1: "top", 2: "trousers", 4: "dress", 5: "shoe", 8: "bag", 9: "boot",
    }  # fmt: skip
    by_image = {image["id"]: [] for image in data["images"]}
    for row in data["annotations"]:
        mask = mask_utils.decode(row["segmentation"])
        ys, xs = np.nonzero(mask)
        assert row["bbox"] == [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        assert row["area"] == mask.sum() > 0
        by_image[row["image_id"]].append(mask)
    counts = [len(masks) for masks in by_image.values()]
    assert 0 in counts
    assert max(counts) >= 4
    assert all(sum(masks).max() <= 1 for masks in by_image.values() if masks)  # a pixel belongs to one garment
    assert len(CocoDataset(made / "train.json", made / "train", train=True, masks=True)) == 40
    make_garments.main([str(tmp_path), "--train", "40", "--val", "3", "--side", "96"])
    for name in ("train.json", "val.json", "train/00007.png", "val/00002.png"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


def test_masks_are_exactly_the_pasted_pixels():
    rng = np.random.default_rng(3)
    garments = [np.full((28, 28), value, np.uint8) for value in (255, 255)]
    image, masks = make_garments.make_image(garments, 96, rng)
    bare = make_garments.make_canvas(96, np.random.default_rng(3)).round().astype(np.uint8)
    pasted = np.logical_or.reduce([mask for mask in masks if mask is not None])
    assert (image == bare).all(-1)[~pasted].all()
    assert not (image == bare).all(-1)[pasted].any()


def test_garments_from_nowhere(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        make_garments.main([str(tmp_path / "out"), "--source", str(tmp_path / "gone")])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# -- pictures


def test_a_detection_is_drawn(tmp_path):
    image = torch.full((3, 100, 150), 0.5)
    masks = torch.zeros(2, 1, 100, 150)
    masks[0, 0, 30:60, 40:90] = 1
    masks[1, 0, 70:, :] = 1
    detection = {
        "boxes": torch.tensor([[40.0, 30.0, 90.0, 60.0], [0.0, 70.0, 150.0, 100.0]]),
        "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.9, 0.4]),
        "masks": masks,
    }
    picture = draw_detections(image, detection, classes=["a", "b"], threshold=0.5)
    assert picture.shape == (3, 300, 450)  # three times as large
    assert picture[:, 150, 210].tolist() == pytest.approx([(128 + c) / 2 for c in colour(2)], abs=1)  # half the colour
    assert picture[:, 120, 120].tolist() == list(colour(2))  # the box's left side
    assert (picture[:, 215:] == 128).all()  # a score below the threshold
    assert (draw_detections(image, detection, classes=["a", "b"], threshold=0.95) == 128).all()
    detection["masks"] = torch.ones(2, 1, 100, 150)  # where masks overlap, the better one is seen
    both = draw_detections(image, detection, classes=["a", "b"], threshold=0.3)
    assert both[:, 290, 440].tolist() == pytest.approx([(128 + c) / 2 for c in colour(2)], abs=1)
    assert len({colour(label) for label in range(1, 21)}) == 20
    save_picture([picture, picture[:, :100, :80]], tmp_path / "new" / "p.png")
    with Image.open(tmp_path / "new" / "p.png") as file:
        assert file.size == (2 * 450 + 3 * 4, 300 + 2 * 4)
    with pytest.raises(OSError, match=r"p\.png"):
        save_picture([picture], tmp_path / "new" / "p.png" / "q.png")
