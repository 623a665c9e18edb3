"""What a sweep over thresholds costs: sixteen points against one run.

    python benchmarks/sweep.py --photos FOLDER --scenes 200

Labels scenes of the independent generator with their true masks, runs the command once on them, and then
`-m` over eight scores and two NMS thresholds, and prints the seconds of both and their ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from independent import COLOURS, pictures, scene


def sample(place: Path, count: int, photos: list[Path]) -> None:
    """Scenes under `in/`, and `truth.json`."""
    (place / "in").mkdir()
    images, annotations = [], []
    for i in range(count):
        image, truths = scene(np.random.default_rng([51, i]), photos)
        Image.fromarray(image).save(place / "in" / f"{i:04d}.png")
        images.append({"id": i, "file_name": f"{i:04d}.png", "width": image.shape[1], "height": image.shape[0]})
        for truth in truths:
            rle = coco_mask.encode(np.asfortranarray(truth.mask, dtype=np.uint8))
            one = {"id": len(annotations) + 1, "image_id": i, "category_id": list(COLOURS).index(truth.colour) + 1}
            one |= {"bbox": coco_mask.toBbox(rle).tolist(), "area": int(truth.mask.sum()), "iscrowd": 0}
            one["segmentation"] = {"size": list(truth.mask.shape), "counts": rle["counts"].decode()}
            annotations.append(one)
    categories = [{"id": i + 1, "name": f"{colour} shape"} for i, colour in enumerate(COLOURS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (place / "truth.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        sample(place, args.scenes, pictures(args.photos))
        command = str(Path(sys.executable).with_name("grounded-sam"))
        words = ["preset=shapes", f"input={place / 'in'}", f"truth={place / 'truth.json'}", "sink=metrics"]
        words.append(f"text=[{','.join(f'{colour} shape' for colour in COLOURS)}]")
        seconds = []
        swept = ["select.score=0.1,0.15,0.2,0.25,0.3,0.35,0.4,0.5", "select.nms=0.5,0.7"]
        for flags, more in (
            ([], [f"output={place / 'one'}", "select.score=0.1"]),
            (["-m"], [f"output={place / 'many'}", *swept]),
        ):
            begin = time.perf_counter()
            subprocess.run([command, *flags, *words, *more], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - begin)
        print((place / "many" / "sweep.md").read_text())
    print(f"one run {seconds[0]:.1f} s, sixteen points {seconds[1]:.1f} s: {seconds[1] / seconds[0]:.2f} times")


if __name__ == "__main__":
    main()
