"""Whether JPEG files come as fast as the published tokenizer's encoder takes them.

    python benchmarks/loading.py --device cuda --threads 1 4 8 16

Writes a folder of JPEGs of ImageNet's usual size (noise as strong in every octave, as photographs
are, about as many bytes as theirs), then tells, for every number of `image-folder`'s threads (and
of `num_workers` processes, each with so many threads): the images a second that `sandbox.stream`
brings to the device where nothing else happens; those where each batch is tokenized as for a cache
(TF32 on a GPU, its encoder by kernels of its own); and, the same in every row, those tokenized of a
batch that lies on the device already. Where the second is near the third, the device never waits.
`--loading-only` leaves the last two out, as suits a CPU; 0 threads are as many as by default.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product, repeat
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import sandbox
from sandbox_plugins.datasets import ImageFolder
from sandbox_plugins.tasks.encoding import coding, coding_precision, in_bulk

RECIPE = Path(__file__).parents[1] / "recipes/sample_var_d16.yaml"
HEIGHT, WIDTH, QUALITY = 375, 500, 90
AHEAD = 6
"""Batches that are loaded before they are asked for, at most, and two more for each process."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=1024, help="files")
    parser.add_argument("--batches", type=int, default=64, help="timed in every cell of the table")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 4, 16])
    parser.add_argument("--loading-only", action="store_true")
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="processes")
    options = parser.parse_args()
    device = torch.device(options.device)
    tokenizer = sandbox.load(RECIPE, "weights={}", device=options.device).tokenizer
    if options.images < options.batch_size:
        parser.error("--images: fewer than a batch")
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = write_images(Path(folder), options.images)
        print(
            f"{options.images} JPEGs of {WIDTH} x {HEIGHT}, {num_bytes / options.images / 1e3:.0f} "
            f"kB each, to {' x '.join(map(str, tokenizer.image_size))}, batches of "
            f"{options.batch_size}, {sandbox.device_name(device)}, torch {torch.__version__}\n"
        )
        print("| threads | processes | loaded, img/s | tokenized, img/s | on the device, img/s |")
        print("|---|---|---|---|---|")
        quick = in_bulk(tokenizer, device, compiled=device.type == "cuda")
        with torch.no_grad(), quick, coding(device, coding_precision(device, "tf32")):
            blank = torch.zeros(options.batch_size, 3, *tokenizer.image_size, device=device)
            held = None
            if not options.loading_only:
                held = per_second(lambda: repeat(blank), tokenizer.encode, 2, options, device)
            for threads, workers in product(options.threads, options.workers):
                rates = loaded_and_tokenized(
                    Path(folder), threads, workers, tokenizer, options, device
                )
                told = " | ".join("-" if rate is None else f"{rate:.0f}" for rate in (*rates, held))
                print(f"| {threads} | {workers} | {told} |", flush=True)


def write_images(folder: Path, count: int) -> int:
    """So many JPEGs in one class's folder, and their bytes in all."""
    (folder / "train/any").mkdir(parents=True)
    (folder / "val/any").mkdir(parents=True)
    picture(count).save(folder / "val/any/0.jpg")

    def write(number: int) -> int:
        path = folder / f"train/any/{number:05}.jpg"
        picture(number).save(path, quality=QUALITY)
        return path.stat().st_size

    with ThreadPoolExecutor() as pool:
        return sum(pool.map(write, range(count)))


def picture(seed: int) -> Image.Image:
    """Noise whose octaves are about as strong as a photograph's."""
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.zeros(1, 3, HEIGHT, WIDTH)
    for octave in range(8):
        noise = torch.randn(1, 3, 3 * 2**octave // 2 + 1, 2 ** (octave + 1), generator=rng)
        mixed += F.interpolate(noise, (HEIGHT, WIDTH), mode="bilinear") * (1 if octave < 6 else 0.5)
    grey = (mixed[0] * 40 + 128).clamp(0, 255).byte()
    return Image.fromarray(grey.permute(1, 2, 0).numpy())


def loaded_and_tokenized(
    folder: Path,
    threads: int,
    workers: int,
    tokenizer: sandbox.Tokenizer,
    options: argparse.Namespace,
    device: torch.device,
) -> tuple[float, float | None]:
    """Images a second of either."""
    given = {"root": folder, "image_size": tokenizer.image_size, "num_workers": threads or None}
    dataset = ImageFolder(ImageFolder.Params.model_validate(given))

    def images() -> Iterator[Tensor]:
        batches = sandbox.stream(
            *(dataset, "train", options.batch_size), seed=0, num_workers=workers, device=device
        )
        yield from (batch.images for batch in batches)

    ready = AHEAD + 2 * workers
    loaded = per_second(images, lambda batch: None, ready, options, device)
    if options.loading_only:
        return loaded, None
    return loaded, per_second(images, tokenizer.encode, ready, options, device)


def per_second(
    images: Callable[[], Iterator[Tensor]],
    use: Callable[[Tensor], object],
    ready: int,
    options: argparse.Namespace,
    device: torch.device,
) -> float:
    """Images a second after the first `ready` batches, which may have been loaded before."""
    coming, began = images(), 0.0
    for number in range(ready + options.batches):
        if number == ready:
            settle(device)
            began = time.perf_counter()
        use(next(coming))
    settle(device)
    return options.batches * options.batch_size / (time.perf_counter() - began)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
