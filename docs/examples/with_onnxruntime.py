"""Classify a photograph with ONNX Runtime, NumPy and Pillow alone: python with_onnxruntime.py FILE.onnx PHOTOGRAPH"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
size, image = about["input_size"], ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
if about["crop_pct"]:  # resize so that the crop keeps this share of the shorter side
    resized, shorter = int(size / about["crop_pct"]), min(image.size)
    method = Image.Resampling[about["interpolation"].upper()]
    image = image.resize([resized * side // shorter for side in image.size], method)
left, top = (round((side - size) / 2) if side > size else (side - size + 1) // 2 for side in image.size)
pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
batch = ((pixels - about["mean"]) / about["std"]).transpose(2, 0, 1)[None].astype(np.float32)  # (1, 3, size, size)
(logits,) = session.run(["logits"], {"images": batch})
if about["loss"] == "binary_cross_entropy":  # each class by itself
    chances = 1 / (1 + np.exp(-logits[0]))
else:
    chances = np.exp(logits[0] - logits[0].max())
    chances /= chances.sum()
best = logits[0].argmax()
print(f"{about['classes'][best]}: {100 * chances[best]:.2f} %")
