"""What each remedy against codebook collapse does at equal steps, over several seeds.

    python benchmarks/codebook_care.py --jobs 2 --out docs/results/codebook-care

Trains the tokenizer of `codebook_care.yaml` once for each variant and seed (CPU, one thread each),
and writes a table (table.md) and all numbers (results.json). Runs that are there are kept.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECIPE = Path(__file__).with_suffix(".yaml")
BOOK = "tokenizer.codebook."
GRADIENT = (f"{BOOK}update=gradient", f"{BOOK}restart=false")
VARIANTS: dict[str, tuple[str, ...]] = {
    "default: data init, EMA, balanced restart": (),
    "N(0, 1) init, gradient, no restart (the warning)": (*GRADIENT, f"{BOOK}init=normal"),
    "uniform init, gradient, no restart": (*GRADIENT, f"{BOOK}init=uniform"),
    "uniform init, gradient, restart": (f"{BOOK}update=gradient", f"{BOOK}init=uniform"),
    "data init, gradient, no restart": GRADIENT,
    "data init, gradient, restart": (f"{BOOK}update=gradient",),
    "EMA without restart": (f"{BOOK}restart=false",),
    "statistics by tokens, not by scales": (f"{BOOK}balance=tokens",),
    "cosine lookup": (f"{BOOK}lookup=cosine",),
    "SimVQ": ("tokenizer.codebook={name: simvq, vocab_size: 512}",),
    "entropy 0.02, gradient": (f"{BOOK}update=gradient", f"{BOOK}entropy_weight=0.02"),
    "scale dropout 0.2": ("tokenizer.scale_dropout=0.2",),
    "prefix dropout 0.2": ("tokenizer.prefix_dropout=0.2",),
    "rotation trick": ("tokenizer.estimator=rotation",),
    "no phi": ("tokenizer.phi=none",),
    "one phi for all scales": ("tokenizer.phi=shared",),
    "one phi a scale": ("tokenizer.phi=per-scale",),
    "FSQ [8, 8, 8] (512 codes of 3 channels)": (
        "tokenizer.codebook={name: fsq, levels: [8, 8, 8]}",
        "tokenizer.autoencoder.code_dim=3",
    ),
    "LFQ (512 codes of 9 channels)": (
        "tokenizer.codebook={name: lfq}",
        "tokenizer.autoencoder.code_dim=9",
    ),
}
"""What each changes, as after `--set`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/codebook-care"))
    parser.add_argument("--runs", type=Path, default=Path("runs/codebook-care"))
    parser.add_argument("--root", type=Path, default=Path("data/cifar-10-batches-bin"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="variants whose name has this text")
    options = parser.parse_args()
    jobs = [
        (name, seed) for seed in range(options.seeds) for name in VARIANTS if options.only in name
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda job: run(*job, options), jobs))
    results: dict[str, list[dict[str, object]]] = {}
    for (name, _), result in zip(jobs, found, strict=True):
        results.setdefault(name, []).append(result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    table = "\n".join(rows(results))
    (options.out / "table.md").write_text(table + "\n")
    print(table)


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """The result of `inspect-tokenizer` for one variant and seed."""
    folder = options.runs / f"{list(VARIANTS).index(name):02d}-seed{seed}"
    settings = [f"seed={seed}", f"dataset.root={options.root}", *VARIANTS[name]]
    words = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "sandbox", "run", str(RECIPE), "--out", str(folder), *words],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed}: {done.stderr.strip() or done.stdout[-500:]}")
    found: dict[str, object] = json.loads((folder / "2-inspect-tokenizer/result.json").read_text())
    trained = json.loads((folder / "1-train-tokenizer/result.json").read_text())
    return {**found, "seed": seed, "training_seconds": trained["seconds"]}


def rows(results: dict[str, list[dict]]) -> list[str]:
    lines = [
        "| variant | PSNR, dB | codes used | used, scale by scale | perplexity, scale by scale |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        psnr = [each["psnr"] for each in found]
        spread = f" +- {statistics.stdev(psnr):.2f}" if len(psnr) > 1 else ""
        vocab = [512 - each["dead_codes"] for each in found]
        used, perplexity = (
            ", ".join(
                f"{statistics.mean(each['codebook'][k][key] for each in found):.0f}"
                for k in range(len(found[0]["codebook"]))
            )
            for key in ("used", "perplexity")
        )
        lines.append(
            f"| {name} | {statistics.mean(psnr):.2f}{spread} | {statistics.mean(vocab):.0f} | "
            f"{used} | {perplexity} |"
        )
    return lines


if __name__ == "__main__":
    import os

    ENVIRONMENT = dict(os.environ)
    main()
