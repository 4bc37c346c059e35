"""Classifies images with the network of this folder.

    python3 run.py IMAGE_OR_FOLDER...     what each image is, and how long it took
    python3 run.py --check                does this device give the answers that it should?

Needs Python 3.9, numpy, Pillow and the network's runtime; README.md says how to install them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

try:
    import numpy as np
    from PIL import Image
except ModuleNotFoundError as missing:
    sys.exit(f"run.py: {missing.name} is not installed: see README.md")

from bevel.packaging.on_device.sessions.onnxruntime import Session

HERE = Path(__file__).resolve().parent
SCHEMA = 1
FORMATS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TOP = 5
WARMUP_RUNS = 3


class Mistake(Exception):  # noqa: N818
    """Something that the person who started the program can mend; one line."""


def convert(image: Any, colour: str) -> Any:
    """The image in mode L or RGB; 16-bit grayscale is scaled, not clipped."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == colour else image.convert(colour)


def fit(image: Any, resize: int | None, crop: int | None) -> Any:
    """Scale the shorter side, and keep the central square."""
    width, height = image.size
    shorter = min(width, height)
    if resize is not None and shorter != resize:
        longer = int(resize * max(width, height) / shorter)
        width, height = (resize, longer) if width <= height else (longer, resize)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if crop is not None and (width, height) != (crop, crop):
        left, top = round((width - crop) / 2), round((height - crop) / 2)
        image = image.crop((left, top, left + crop, top + crop))
    return image


def prepare(image: Any, meta: dict[str, Any]) -> np.ndarray:
    """The network's input: float32 (1, C, H, W)."""
    how = meta["preprocessing"]
    image = fit(convert(image, meta["input"]["colour"]), how["resize"], how["crop"])
    pixels = np.asarray(image, dtype=np.uint8)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    wanted = tuple(meta["input"]["shape"][1:])
    if pixels.shape != wanted:
        raise Mistake(
            f"it is {pixels.shape[2]}x{pixels.shape[1]} pixels; the network takes "
            f"{wanted[2]}x{wanted[1]} (width x height)"
        )
    mean, std = (np.array(how[key], np.float32)[:, None, None] for key in ("mean", "std"))
    scaled = pixels.astype(np.float32) * np.float32(how["scale"])
    return np.ascontiguousarray(((scaled - mean) / std)[None], dtype=np.float32)


def probabilities(values: Any, activation: str) -> Any:
    """The output as one probability per label."""
    values = np.asarray(values, dtype=np.float64)
    if activation == "none":
        return values
    powers = np.exp(values - values.max())
    return powers / powers.sum()


class Classifier:
    """The network of this folder, loaded and warmed up."""

    def __init__(self, meta: dict[str, Any], threads: int) -> None:
        self.meta = meta
        artifact = meta["artifact"]
        self.session = Session(str(HERE / artifact["file"]), threads, artifact["precision"])
        blank = np.zeros(meta["input"]["shape"], np.float32)
        for _ in range(WARMUP_RUNS):
            self.session(blank)

    def classify(self, path: Path) -> dict[str, Any]:
        """What an image is: the best labels with their probabilities, and the time it took."""
        start = time.perf_counter()
        try:
            with Image.open(path) as image:
                array = prepare(image, self.meta)
        except Mistake as error:
            raise Mistake(f"{path}: {error}") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise Mistake(f"{path} cannot be read as an image: {error}") from error
        ready = time.perf_counter()
        values = self.session(array)
        end = time.perf_counter()
        found = probabilities(values, self.meta["output"]["activation"])
        best = np.argsort(-found, kind="stable")[:TOP]
        labels = self.meta["labels"]
        return {
            "file": str(path),
            "top": [{"label": labels[i], "probability": round(float(found[i]), 6)} for i in best],
            "ms": round((end - ready) * 1e3, 3),
            "prepare_ms": round((ready - start) * 1e3, 3),
        }


def images_of(names: list[str]) -> list[Path]:
    """The image files that are named, and those in the folders that are named, in order."""
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if not path.exists():
            raise Mistake(f"there is no {path}")
        inside = [path] if path.is_file() else sorted(path.rglob("*"))
        images = [p for p in inside if p.suffix.lower() in FORMATS and not p.name.startswith(".")]
        if not images:
            raise Mistake(f"{path} holds no images ({', '.join(sorted(FORMATS))})")
        found += images
    return found


def summary(results: list[dict[str, Any]], labels: list[str]) -> dict[str, Any]:
    """Median times, and the accuracy over the images whose folder is called like a label."""
    rated = [result for result in results if Path(result["file"]).parent.name in labels]
    tops = [[best["label"] for best in result["top"]] for result in rated]
    truths = [Path(result["file"]).parent.name for result in rated]
    hits = [top.index(truths[i]) if truths[i] in top else TOP for i, top in enumerate(tops)]
    return {
        "images": len(results),
        "median_ms": float(np.median([result["ms"] for result in results])),
        "median_prepare_ms": float(np.median([result["prepare_ms"] for result in results])),
        "labelled_images": len(rated),
        "top1": sum(hit == 0 for hit in hits) / len(hits) if hits else None,
        "top5": sum(hit < TOP for hit in hits) / len(hits) if hits else None,
    }


def check(classifier: Classifier) -> dict[str, Any]:
    """Whether the files are whole, and the samples get the labels that they should."""
    meta = classifier.meta
    files = [meta["artifact"], *meta["samples"]]
    damaged = [
        file["file"]
        for file in files
        if hashlib.sha256((HERE / file["file"]).read_bytes()).hexdigest() != file["sha256"]
    ]
    samples = []
    for sample in meta["samples"]:
        best = classifier.classify(HERE / sample["file"])["top"][0]
        samples.append({"file": sample["file"], "expected": sample["top1"], "got": best["label"]})
    agreed = sum(sample["expected"] == sample["got"] for sample in samples)
    return {
        "passed": agreed == len(samples) and not damaged,
        "agreed": agreed,
        "samples": samples,
        "damaged_files": damaged,
    }


def show(results: list[dict[str, Any]], total: dict[str, Any]) -> None:
    """The results as lines for people."""
    for result in results:
        said = [f"{best['label']} {best['probability']:.1%}" for best in result["top"]]
        others = f" ({', '.join(said[1:])})" if said[1:] else ""
        print(f"{result['file']}: {said[0]}{others}  {result['ms']:.2f} ms")  # noqa: T201
    print(  # noqa: T201
        f"{total['images']} images, {total['median_ms']:.2f} ms each, and "
        f"{total['median_prepare_ms']:.2f} ms to read and prepare one (medians)"
    )
    if total["labelled_images"]:
        print(  # noqa: T201
            f"top-1 {total['top1']:.2%}, top-{TOP} {total['top5']:.2%} of the "
            f"{total['labelled_images']} images whose folder is called like a label"
        )


def show_check(found: dict[str, Any]) -> None:
    """The check's result as lines for people."""
    for name in found["damaged_files"]:
        print(f"damaged: {name} is not the file that was packed")  # noqa: T201
    for sample in found["samples"]:
        if sample["expected"] != sample["got"]:
            print(f"{sample['file']}: {sample['got']}, expected {sample['expected']}")  # noqa: T201
    print(  # noqa: T201
        f"check {'passed' if found['passed'] else 'FAILED'}: {found['agreed']} of "
        f"{len(found['samples'])} samples get the label that they should"
    )


def read_meta() -> dict[str, Any]:
    """What meta.json says."""
    try:
        meta = json.loads((HERE / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(f"meta.json beside run.py cannot be read: {error}") from error
    if meta.get("schema") != SCHEMA:
        raise Mistake(f"meta.json has schema {meta.get('schema')}, this program reads {SCHEMA}")
    return dict(meta)


def work(wanted: argparse.Namespace) -> bool:
    """Do what the command line says; whether the check passed, if there was one."""
    meta = read_meta()
    paths = images_of(wanted.images)
    if wanted.threads < 1:
        raise Mistake(f"--threads {wanted.threads}: expected 1 or more")
    classifier = Classifier(meta, wanted.threads)
    results = [classifier.classify(path) for path in paths]
    total = summary(results, meta["labels"]) if results else None
    checked = check(classifier) if wanted.check else None
    if wanted.json:
        about = {"schema": SCHEMA, "name": meta["name"], "runtime": classifier.session.version}
        found = {**about, "images": results, "summary": total, "check": checked}
        print(json.dumps(found, indent=1))  # noqa: T201
    else:
        if total is not None:
            show(results, total)
        if checked is not None:
            show_check(checked)
    return checked is None or bool(checked["passed"])


def main() -> None:
    """Read the command line; exit with 1 if the check failed, with 2 after a mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="*", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--check", action="store_true", help="classify the kit's samples as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=1, help="what the runtime may use")
    wanted = parser.parse_args()
    if not wanted.images and not wanted.check:
        parser.error("name an image or a folder, or give --check")
    try:
        passed = work(wanted)
    except Mistake as error:
        print(f"run.py: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"run.py: {error.name} is not installed: see README.md", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
