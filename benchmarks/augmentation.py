"""Measure the time to deform an image: by ours, by torchvision for each image, by kornia for the batch.

The three take turns on the same batches of images of MNIST's size, so that a busy machine slows all of them.
The table gives the median time of each, and how many times longer it takes than ours.

    pip install kornia
    python -m benchmarks.augmentation --output augmentation.json
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import v2

from mnist_lightning.images.deform import Deformation

AMOUNTS = {"rotation": 12.0, "scale": 0.12, "shear": 12.0, "shift": 1.5, "elastic": 1.2, "smoothness": 5.0}
Deform = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256, help="images in a batch")
    parser.add_argument("--rounds", type=int, default=30, help="number of measurements of each")
    parser.add_argument("--threads", type=int, default=1, help="torch's number of threads")
    parser.add_argument("--device", default="cpu", help="the batch's device; cuda leaves torchvision out")
    parser.add_argument("--output", type=Path, help="also write the numbers to this file, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.batch_size, arguments.rounds, arguments.device)
    result["threads"] = arguments.threads
    print(tabulate(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def contestants(device: str) -> dict[str, Deform]:
    ours = Deformation(**AMOUNTS)
    affine = Deformation(**AMOUNTS | {"elastic": 0.0})
    step = iter(range(2**62))
    found: dict[str, Deform] = {
        "ours": lambda images: ours(images[:, None].float(), next(step))[:, 0],
        "ours, affine alone": lambda images: affine(images[:, None].float(), next(step))[:, 0],
    }
    if device == "cpu":
        shift, scale = AMOUNTS["shift"] / 28, AMOUNTS["scale"]
        bilinear = v2.InterpolationMode.BILINEAR
        one_by_one = v2.Compose(
            [
                v2.RandomAffine(
                    AMOUNTS["rotation"],
                    translate=(shift, shift),
                    scale=(1 - scale, 1 + scale),
                    shear=AMOUNTS["shear"],
                    interpolation=bilinear,
                ),
                v2.ElasticTransform(alpha=34.0, sigma=AMOUNTS["smoothness"], interpolation=bilinear),
            ]
        )
        found["torchvision v2, each image"] = lambda images: torch.stack(
            [one_by_one(image[None].float())[0] for image in images]
        )
    if importlib.util.find_spec("kornia"):
        from kornia import augmentation

        shift, scale = AMOUNTS["shift"] / 28, AMOUNTS["scale"]
        batch = torch.nn.Sequential(
            augmentation.RandomAffine(
                AMOUNTS["rotation"],
                translate=(shift, shift),
                scale=(1 - scale, 1 + scale),
                shear=AMOUNTS["shear"],
                p=1.0,
            ),
            augmentation.RandomElasticTransform(
                kernel_size=(27, 27), sigma=(AMOUNTS["smoothness"],) * 2, alpha=(1.2, 1.2), p=1.0
            ),
        ).to(device)
        found["kornia, the batch"] = lambda images: batch(images[:, None].float() / 255)[:, 0]
    return found


def measure(batch_size: int, rounds: int, device: str) -> dict[str, object]:
    """Measure microseconds for each image, of all candidates in turn."""
    images = torch.randint(0, 256, (batch_size, 28, 28), dtype=torch.uint8, device=device)
    candidates = contestants(device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, deform in candidates.items():
            start = time.perf_counter()
            deformed = deform(images)
            if device != "cpu":
                torch.cuda.synchronize()
            if number:  # the first turn warms up
                times[name].append((time.perf_counter() - start) / batch_size * 1e6)
            assert deformed.shape == images.shape
    ours = times["ours"]
    return {
        "batch_size": batch_size,
        "rounds": rounds,
        "device": device,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "us_per_image": {name: statistics.median(values) for name, values in times.items()},
        "fastest_us_per_image": {name: min(values) for name, values in times.items()},
        # the ratio within each round: other work on the machine slows both
        "times_ours": {
            name: statistics.median(a / b for a, b in zip(values, ours, strict=True))
            for name, values in times.items()
        },
    }


def tabulate(result: dict[str, object]) -> str:
    medians, ratios, fastest = (result[key] for key in ("us_per_image", "times_ours", "fastest_us_per_image"))
    assert isinstance(medians, dict)
    assert isinstance(ratios, dict)
    assert isinstance(fastest, dict)
    lines = [f"{'µs an image':28} {'median':>8} {'fastest':>8} {'× ours':>8}"]
    lines += [f"{n:28} {medians[n]:8.1f} {fastest[n]:8.1f} {ratios[n]:8.2f}" for n in medians]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
