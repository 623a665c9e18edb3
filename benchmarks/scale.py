"""Measure `engine=ray` on this machine with a stage that sleeps, so that the number of cores does not matter.

    python benchmarks/scale.py --json scale.json                        # everything
    python benchmarks/scale.py throughput skew --images 1000            # some of it
    python benchmarks/scale.py bucket --images 20000 --seconds 0.01

- `throughput`: images a second after the workers are up, of one process and of two workers, and startup and memory.
- `skew`: the first tenth of the images takes 20 times as long; two workers, and two static shards, against the ideal.
- `kills`: one of two workers is killed every ten seconds, ten times; what is lost, stored twice or computed again.
- `driver`: the command is killed at five random moments and started again; the same.
- `bucket`: the images in a bucket of an S3 server (moto) on this machine, beside the same in a folder, by one process,
  and by two workers; rows of the stores that differ, images a second, memory, temporary files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from grounded_sam.structures.detections import make_detections

HERE = Path(__file__).resolve().parent
BATCH = 8


class Sleeps:
    """A detector that finds the left half of each image after a while, and logs when it was there.

    Args:
        seconds: Seconds per image. Logs go to the folder of `SCALE_LOG`, one file per process.
        slow: Images whose number is below this take 20 times as long.
    """

    def __init__(self, seconds: float, slow: int = 0) -> None:
        self.log, self.seconds, self.slow = Path(os.environ["SCALE_LOG"]), seconds, slow
        self.log.mkdir(parents=True, exist_ok=True)

    def detect(self, frames, vocabulary):
        results = []
        for frame in frames:
            start = time.time()
            time.sleep(self.seconds * (20 if int(Path(frame.name).stem) < self.slow else 1))
            with (self.log / str(os.getpid())).open("a") as file:
                file.write(json.dumps([frame.name, start, time.time()]) + "\n")
            height, width = frame.size_hw
            results.append(make_detections([[0, 0, width / 2, height]], [0.9], [0], vocabulary, frame.size_hw))
        return results


def log_of(folder: Path) -> list[tuple[str, float, float]]:
    """Return name, start and end of each image, of all processes."""
    lines = [line for file in folder.glob("*") for line in file.read_text().splitlines()]
    return [tuple(json.loads(line)) for line in lines]


class Bench:
    """A folder of images, and commands that label it.

    Args:
        folder: Where to work.
        images: Number of images.
        seconds: Seconds per image.
    """

    def __init__(self, folder: Path, images: int, seconds: float) -> None:
        self.folder, self.images, self.seconds = folder, images, seconds
        (folder / "in").mkdir()
        for i in range(images):
            Image.fromarray(np.full((24, 32, 3), i % 256, np.uint8)).save(folder / "in" / f"{i:06d}.png")
        (folder / "conf" / "detector").mkdir(parents=True)
        (folder / "conf" / "detector" / "sleeps.yaml").write_text("_target_: scale.Sleeps\nseconds: 0.01\nslow: 0\n")

    def command(self, name: str, *overrides: str, slow: int = 0) -> list[str]:
        """Return the command that labels into `name`, and logs into `name`-log."""
        return [
            *(sys.executable, "-W", "ignore", "-m", "grounded_sam", f"--config-dir={self.folder / 'conf'}"),
            *("preset=label", "detector=sleeps", "segmenter=none", "tracker=none", "text=[a]", "sink=[store]"),
            *(f"input={self.folder / 'in'}", f"output={self.folder / name}"),
            *(f"detector.seconds={self.seconds}", f"detector.slow={slow}", "device=cpu", *overrides),
        ]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}-log"

    def ray(self, workers: int) -> list[str]:
        """Return the overrides for a number of workers."""
        return ["engine=ray", f"engine.concurrency={workers}", "engine.num_cpus=1", f"engine.batch={BATCH}"]

    def start(self, name: str, *overrides: str, slow: int = 0) -> subprocess.Popen[bytes]:
        """Start the command that labels into `name`."""
        command = self.command(name, *overrides, slow=slow)
        path = os.pathsep.join([str(HERE), str(HERE.parent)])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SCALE_LOG": str(self.log(name))}
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)

    def seconds_of(self, name: str) -> float:
        """Return the seconds from the first image to the end of the last one."""
        log = log_of(self.log(name))
        return max(end for _, _, end in log) - min(start for _, start, _ in log)

    def counts(self, name: str) -> dict[str, int]:
        """Return what the store and the log have: lost and doubled images, and images computed again."""
        import pyarrow.parquet as pq

        from grounded_sam.formats.store import StoreReader

        reader = StoreReader(self.folder / name / "store")
        names = Counter(reader.name(key) for key in map(str, reader.keys()))
        parts = list((self.folder / name / "store").glob("*.parquet"))
        rows = sum(kind == "image" for part in parts for kind in pq.read_table(part)["kind"].to_pylist())
        return {
            "images": self.images,
            "stored": len(names),
            "lost": self.images - len(names),
            "twice": sum(count > 1 for count in names.values()),
            "rows_replaced_by_later_ones": rows - len(names),
            "computed_again": len(log_of(self.log(name))) - self.images,
        }


def descendants(pid: int) -> dict[int, str]:
    """Return the processes below a process, with the beginning of their command lines."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")[:80]
        except (OSError, ValueError):
            continue
    found, last = {pid}, set()
    while found != last:
        last = set(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return {child: names.get(child, "") for child in found - {pid}}


def workers_of(pid: int) -> list[int]:
    """Return the processes of the workers that a command has started."""
    return [child for child, name in descendants(pid).items() if "_RayWorker" in name]


def rss_mib(pid: int) -> float:
    try:
        return int((Path("/proc") / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


class Memory(threading.Thread):
    """Sample the memory of a command and of its workers each second, from the time that all of them work."""

    def __init__(self, pid: int, is_up: Callable[[], bool]) -> None:
        super().__init__(daemon=True)
        self.pid, self.is_up, self.ended = pid, is_up, threading.Event()
        self.driver: list[float] = []
        self.workers: list[float] = []
        self.start()

    def run(self) -> None:
        while not self.ended.wait(1):
            if self.is_up():
                self.driver.append(rss_mib(self.pid))
                self.workers.append(max(map(rss_mib, workers_of(self.pid)), default=0.0))

    def result(self) -> dict[str, float]:
        """Return medians of the second and of the last fifth, in MiB."""
        self.ended.set()
        found = {}
        for name in ("driver", "workers"):
            values = [value for value in getattr(self, name) if value]
            fifth = max(1, len(values) // 5)
            for when, part in (("early", values[fifth : 2 * fifth]), ("late", values[-2 * fifth : -fifth])):
                found[f"{name}_{when}_mib"] = round(float(np.median(part)), 1) if part else 0.0
        return found


def throughput(bench: Bench) -> dict[str, object]:
    started = time.time()
    process = bench.start("local")
    process.wait()
    local = {"images_per_s": bench.images / bench.seconds_of("local"), "wall_s": time.time() - started}
    started = time.time()
    process = bench.start("ray", *bench.ray(2))
    memory = Memory(process.pid, lambda: len(list(bench.log("ray").glob("*"))) == 2)
    code = process.wait()
    first = min(start for _, start, _ in log_of(bench.log("ray")))
    ray = {"images_per_s": bench.images / bench.seconds_of("ray"), "wall_s": time.time() - started, "exit": code}
    ray |= {"startup_s": first - started, **memory.result(), **bench.counts("ray")}
    return {"one_process": local, "ray_two_workers": ray, "speedup": ray["images_per_s"] / local["images_per_s"]}


def skew(bench: Bench) -> dict[str, object]:
    slow = bench.images // 10
    ideal = bench.seconds * (slow * 20 + bench.images - slow) / 2
    bench.start("skew", *bench.ray(2), slow=slow).wait()
    shards = [bench.start("shards", f"source.shard={i}", "source.num_shards=2", slow=slow) for i in range(2)]
    for shard in shards:
        shard.wait()
    ray, static = bench.seconds_of("skew"), bench.seconds_of("shards")
    return {"ideal_s": ideal, "ray": ray / ideal, "static_shards": static / ideal, "ray_s": ray, "static_s": static}


def kills(bench: Bench, times: int = 10, every_s: float = 10.0) -> dict[str, object]:
    process, done = bench.start("kills", *bench.ray(2)), 0
    while done < times and process.poll() is None:
        time.sleep(every_s)
        workers = workers_of(process.pid)
        working = {int(path.name) for path in bench.log("kills").glob("*")} & set(workers)
        if working:  # not one that is still starting
            os.kill(random.Random(done).choice(sorted(working)), signal.SIGKILL)
            done += 1
    return {"killed": done, "exit": process.wait(), **bench.counts("kills")}


def driver(bench: Bench, times: int = 5) -> dict[str, object]:
    moments, killed = random.Random(3), 0
    while True:
        before = len(log_of(bench.log("driver")))
        process = bench.start("driver", *bench.ray(2))
        wanted = before + bench.images * moments.uniform(0.08, 0.18)
        while killed < times and process.poll() is None and len(log_of(bench.log("driver"))) < wanted:
            time.sleep(0.2)
        if killed == times or process.poll() is not None:
            break
        children = descendants(process.pid)
        process.kill()
        process.wait()
        killed += 1
        end = time.time() + 60
        while time.time() < end and any((Path("/proc") / str(pid)).exists() for pid in children):
            time.sleep(0.5)
    code = process.wait()
    counts = bench.counts("driver")
    share = counts["computed_again"] / bench.images / max(killed, 1)
    return {"killed": killed, "exit": code, "again_per_kill": share, **counts}


def bucket(bench: Bench) -> dict[str, object]:
    import pyarrow.parquet as pq

    sys.path.insert(0, str(HERE.parent / "tests"))
    from s3 import CREDENTIALS, client, running_server

    def rows_of(name: str) -> list[tuple[str, ...]]:
        tables = [pq.read_table(part) for part in sorted((bench.folder / name / "store").glob("*.parquet"))]
        columns = [c for c in tables[0].column_names if c not in ("path", "etag", "mtime_ns", "take")]
        return sorted({tuple(repr(row[c]) for c in columns) for table in tables for row in table.to_pylist()})

    def temporary_files() -> set[str]:
        return {entry.name for entry in Path(tempfile.gettempdir()).iterdir() if not entry.name.startswith("ray")}

    figures: dict[str, object] = {"images": bench.images}
    with running_server() as endpoint:
        os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=endpoint, NO_PROXY="127.0.0.1")
        s3 = client(endpoint)
        s3.create_bucket(Bucket="scale")
        for path in sorted((bench.folder / "in").iterdir()):
            s3.put_object(Bucket="scale", Key=f"photos/{path.name}", Body=path.read_bytes())
        before = temporary_files()
        runs = {
            "folder": (),
            "bucket": ("input=s3://scale/photos/",),
            "ray": ("input=s3://scale/photos/", *bench.ray(2)),
        }
        for name, overrides in runs.items():
            process = bench.start(name, *overrides)
            memory = Memory(process.pid, lambda name=name: bench.log(name).exists())
            code = process.wait()
            figures[name] = {
                **{"exit": code, "images_per_s": bench.images / bench.seconds_of(name)},
                **{"computed": len(log_of(bench.log(name))), **memory.result()},
            }
            if name != "folder":
                figures[name]["rows_that_differ"] = len(set(rows_of("folder")) ^ set(rows_of(name)))
        figures["rows"] = len(rows_of("folder"))
        figures["temporary_files"] = sorted(temporary_files() - before)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"throughput": throughput, "skew": skew, "kills": kills, "driver": driver, "bucket": bucket}
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=0.05, help="per image")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    figures: dict[str, object] = {"images": args.images, "seconds": args.seconds, "batch": BATCH}
    for name in args.parts or parts:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = parts[name](Bench(Path(folder), args.images, args.seconds))
        print(name, json.dumps(figures[name], indent=1), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
