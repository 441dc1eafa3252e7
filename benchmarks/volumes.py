"""Volumes out of a shard beside nii.gz: a CT-like 512 x 512 x 200 volume, from bytes in memory or the page cache.

Run from the repository root: ``python benchmarks/volumes.py [--repeats 3] [--slices 200]``. Peers: nibabel
(``pip install 'medvlm[prep]'``) and SimpleITK (``pip install simpleitk``); one that is not importable is skipped and
named. Each is timed in CPU-seconds of one thread for the same three jobs, and must return the same voxels:

- whole: all voxels as int16;
- crop: 64 x 256 x 256 voxels as int16, as a training crop takes them;
- windowed: all voxels as uint8 in one HU window (40, 400), which is what a model sees.

The volume is synthetic (smooth tissue, lungs, 13 HU of noise): real scans compress differently.
"""

import argparse
import gzip
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from medvlm.data.volumes import decode_volume, encode_volume, read_subvolume, window

WINDOW = [(40.0, 400.0)]


def ct_like(depth: int) -> np.ndarray:
    """int16 [depth, 512, 512] in HU: a body of soft tissue with two lungs, in air."""
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[:depth, :512, :512]
    body = ((x - 256) / 230.0) ** 2 + ((y - 256) / 170.0) ** 2 < 1
    lungs = [((x - c) / 70.0) ** 2 + ((y - 256) / 90.0) ** 2 < 1 for c in (160, 352)]
    volume = np.empty((depth, 512, 512), np.int16)
    for k in range(depth):
        plane = np.where(body, 40 + 30 * np.sin(x / 37) + 20 * np.cos(y / 23) + 15 * np.sin(z[k] / 11), -1000.0)[0]
        if k > depth // 3:
            plane[(lungs[0] | lungs[1])[0]] = -850
        volume[k] = np.rint(plane + rng.normal(0, 13, plane.shape)).clip(-1024, 3071)
    return volume


def installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.machine()


def best(job: Callable[[], np.ndarray], repeats: int) -> float:
    """The fastest of ``repeats`` runs, in CPU-seconds: all jobs have one thread, and others may use the machine."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        job()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slices", type=int, default=200)
    options = parser.parse_args()
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"

    volume = ct_like(options.slices)
    middle = options.slices // 2
    part = (slice(max(0, middle - 32), middle + 32), slice(128, 384), slice(128, 384))
    crop, shown = volume[part], window(volume, WINDOW)
    frame, frame8 = encode_volume(volume), encode_volume(shown)

    # name -> (bytes, whole, crop, windowed)
    Jobs = tuple[int, Callable | None, Callable, Callable]
    rows: dict[str, Jobs] = {
        "int16 frame (.b2)": (
            len(frame),
            lambda: decode_volume(frame),
            lambda: read_subvolume(frame, part),
            lambda: window(decode_volume(frame), WINDOW),
        ),
        "uint8 frame, one window (.b2)": (
            len(frame8),
            None,
            lambda: read_subvolume(frame8, (slice(None), *part)),
            lambda: decode_volume(frame8),
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ct.nii.gz"
        if installed("nibabel"):
            import nibabel

            image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), np.diag([-0.7, -0.7, 1.5, 1]))
            path.write_bytes(gzip.compress(image.to_bytes(), 6))
            turned = tuple(reversed(part))

            def whole() -> np.ndarray:
                return np.asarray(nibabel.load(path).dataobj).transpose(2, 1, 0)

            rows["nii.gz, nibabel"] = (
                path.stat().st_size,
                whole,
                lambda: np.asarray(nibabel.load(path).dataobj[turned]).transpose(2, 1, 0),
                lambda: window(whole(), WINDOW),
            )
            if installed("simpleitk"):
                import SimpleITK

                def itk() -> np.ndarray:
                    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))

                rows["nii.gz, SimpleITK"] = (
                    path.stat().st_size,
                    itk,
                    lambda: itk()[part],
                    lambda: window(itk(), WINDOW),
                )
            else:
                print("SimpleITK is skipped: not importable, `pip install simpleitk`\n")
        else:
            print("nii.gz is skipped: nibabel is not importable, `pip install 'medvlm[prep]'`\n")

        times = {}
        for name, (_, *jobs) in rows.items():
            expected = (volume, crop if "uint8" not in name else shown[(slice(None), *part)], shown)
            for job, wanted in zip(jobs, expected, strict=True):
                assert job is None or np.array_equal(job(), wanted), f"{name}: other voxels"
            times[name] = [best(job, options.repeats) if job else None for job in jobs]

    peer = times.get("nii.gz, nibabel")
    packages = [name for name in ("blosc2", "numpy", "nibabel", "simpleitk") if installed(name)]
    print(f"{volume.nbytes / 1e6:.1f} MB of int16 {volume.shape}; {processor()}; Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in packages) + "; per CPU-second, in brackets against nibabel")
    print("\n| format | MB | whole, /s | crop 64x256x256, /s | windowed uint8, /s |\n|---|---|---|---|---|")
    for name, (size, *_) in rows.items():
        cells = []
        for n, seconds in enumerate(times[name]):
            ratio = f" ({peer[n] / seconds:.1f}x)" if peer and seconds and peer is not times[name] else ""
            cells.append(f"{1 / seconds:.1f}{ratio}" if seconds else "-")
        print(f"| {name} | {size / 1e6:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
