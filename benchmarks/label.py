"""Labelling many pictures: does memory grow, and what does a second run over a complete store cost?

    python benchmarks/label.py --images 20000                       stages without weights, from tests/fakes.py
    python benchmarks/label.py --images 3000 --weights shapes       the small models of the package

Makes pictures of 64x48 px, labels them with the command in a process of its own whose resident memory is
read twice a second, runs the same command again, and prints memory by images stored, and both times.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
FAKES = "_target_: fakes.Halves\n"
FILL = "_target_: fakes.Fill\n"


def pictures(folder: Path, count: int) -> None:
    """Small scenes, and variations of them by a few pixels so that no file equals another."""
    from PIL import Image

    from grounded_sam.shapes.scenes import make_scene

    folder.mkdir()
    base = [make_scene(np.random.default_rng(i), count=2, size_hw=(48, 64)).image for i in range(200)]
    for i in range(count):
        image = base[i % len(base)].copy()
        image.reshape(-1)[:4] = np.frombuffer(i.to_bytes(4, "little"), np.uint8)
        Image.fromarray(image).save(folder / f"{i:06d}.png", compress_level=1)


def run(words: list[str], output: Path) -> tuple[float, list[tuple[int, float]]]:
    """Seconds that the command took, and its resident MiB by images stored so far."""
    import pyarrow.parquet as pq

    command = [str(Path(sys.executable).with_name("grounded-sam")), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    begin, samples, counted = time.perf_counter(), [], {}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.5)
            for part in (output / "store").glob("part-*.parquet"):
                if part not in counted:
                    kinds = pq.read_table(part, columns=["kind"])["kind"].to_pylist()
                    counted[part] = kinds.count("image")
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            except (OSError, IndexError):
                break
            samples.append((sum(counted.values()), pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
    if process.returncode:
        sys.exit(f"the command failed with {process.returncode}")
    return time.perf_counter() - begin, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--weights", choices=["none", "shapes"], default="none")
    parser.add_argument("--sinks", default="store")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, output, conf = Path(place, "in"), Path(place, "out"), Path(place, "conf")
        pictures(folder, args.images)
        for group, name, content in (("detector", "fake", FAKES), ("segmenter", "fake", FILL)):
            (conf / group).mkdir(parents=True)
            (conf / group / f"{name}.yaml").write_text(content)
        words = [f"--config-dir={conf}", f"input={folder}", f"output={output}", "text=[red shape, blue shape]"]
        if args.weights == "none":
            words += ["preset=label", "detector=fake", "segmenter=fake", "tracker=none"]
        else:
            words += ["preset=[shapes,label]"]
        words += [f"sink=[{args.sinks}]"]
        first, samples = run(words, output)
        second, again = run(words, output)
    early = max((mib for count, mib in samples if count <= 2000), default=0.0)
    late = max((mib for count, mib in samples if count > 2000), default=0.0)
    for mark in range(0, args.images + 1, max(args.images // 10, 1)):
        there = [mib for count, mib in samples if count >= mark]
        if there:
            print(f"{mark:7,} stored: {there[0]:,.0f} MiB")
    print(
        f"most until 2,000 were stored {early:,.0f} MiB, after that {late:,.0f} MiB ({100 * (late / early - 1):+.1f}%)"
    )
    print(
        f"first run {first:.1f} s, second {second:.1f} s ({100 * second / first:.1f}%), "
        f"at most {max((mib for _, mib in again), default=0):,.0f} MiB"
    )


if __name__ == "__main__":
    main()
