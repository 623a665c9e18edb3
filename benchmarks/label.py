"""Label many images: does memory grow, and what does a second run over a complete store cost?

    python benchmarks/label.py --images 20000                       stages without weights, from tests/fakes.py
    python benchmarks/label.py --images 3000 --weights shapes       the embedded models

Images of 64x48 px are labeled by the command in a process of its own, whose resident memory is read twice per second;
then the same command runs again. Printed are the memory by number of stored images, and both run times.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
FAKE_CONFIGS = {
    "detector/fake.yaml": "_target_: fakes.Halves\n",
    "segmenter/fake.yaml": "_target_: fakes.Fill\n",
}


@dataclass(frozen=True)
class MemorySample:
    """Resident memory of a process.

    Attributes:
        stored: Number of images in the store at that time.
        mib: Resident memory in MiB.
    """

    stored: int
    mib: float


def make_images(folder: Path, count: int) -> None:
    """Write small scenes, varied by a few pixels so that no file equals another."""
    from PIL import Image

    from grounded_sam.shapes.scenes import make_scene

    folder.mkdir()
    scenes = [make_scene(np.random.default_rng(i), count=2, size_hw=(48, 64)).image for i in range(200)]
    for i in range(count):
        image = scenes[i % len(scenes)].copy()
        image.reshape(-1)[:4] = np.frombuffer(i.to_bytes(4, "little"), np.uint8)
        Image.fromarray(image).save(folder / f"{i:06d}.png", compress_level=1)


def run_command(overrides: list[str], output: Path) -> tuple[float, list[MemorySample]]:
    """Run the command; return the seconds that it took, and samples of its memory."""
    import pyarrow.parquet as pq

    command = [str(Path(sys.executable).with_name("grounded-sam")), *overrides]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    start, samples, images_by_part = time.perf_counter(), [], {}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.5)
            for part in (output / "store").glob("part-*.parquet"):
                if part not in images_by_part:
                    kinds = pq.read_table(part, columns=["kind"])["kind"].to_pylist()
                    images_by_part[part] = kinds.count("image")
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            except (OSError, IndexError):
                break
            samples.append(MemorySample(sum(images_by_part.values()), pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
    if process.returncode:
        sys.exit(f"the command failed with exit code {process.returncode}")
    return time.perf_counter() - start, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--weights", choices=["none", "shapes"], default="none")
    parser.add_argument("--sinks", default="store")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images, output, conf = Path(folder, "in"), Path(folder, "out"), Path(folder, "conf")
        make_images(images, args.images)
        for name, content in FAKE_CONFIGS.items():
            (conf / name).parent.mkdir(parents=True)
            (conf / name).write_text(content)
        overrides = [f"--config-dir={conf}", f"input={images}", f"output={output}", "text=[red shape, blue shape]"]
        if args.weights == "none":
            overrides += ["preset=label", "detector=fake", "segmenter=fake", "tracker=none"]
        else:
            overrides += ["preset=[shapes,label]"]
        overrides += [f"sink=[{args.sinks}]"]
        first_s, samples = run_command(overrides, output)
        second_s, second_samples = run_command(overrides, output)
    for mark in range(0, args.images + 1, max(args.images // 10, 1)):
        reached = [sample.mib for sample in samples if sample.stored >= mark]
        if reached:
            print(f"{mark:7,} stored: {reached[0]:,.0f} MiB")
    early = max((sample.mib for sample in samples if sample.stored <= 2000), default=0.0)
    late = max((sample.mib for sample in samples if sample.stored > 2000), default=0.0)
    print(f"peak up to 2,000 stored {early:,.0f} MiB, after that {late:,.0f} MiB ({100 * (late / early - 1):+.1f}%)")
    second_peak = max((sample.mib for sample in second_samples), default=0.0)
    print(
        f"first run {first_s:.1f} s, second run {second_s:.1f} s ({100 * second_s / first_s:.1f}%), "
        f"peak {second_peak:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
