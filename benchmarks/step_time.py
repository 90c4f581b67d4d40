"""Measure a training step of bare torch in milliseconds, by hidden units, batch size and number of threads.

A step is forward, backward and AdamW of a 784-hidden-10 net; idle threads wait as in the project's commands.
The script prints a line of JSON for each size; ``benchmarks.busy`` runs it on a quiet and on a busy machine.

    python -m benchmarks.step_time --threads 2
"""

import argparse
import json
import statistics
import time

from mnist_lightning import threads

HIDDEN = (64, 128, 256, 512, 1024, 2048)
BATCHES = (64, 256, 1024)
MIN_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch's number of threads (1)")
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN, help=f"hidden units {HIDDEN}")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help=f"batch sizes {BATCHES}")
    parser.add_argument("--seconds", type=float, default=0.7, help="seconds for each size (0.7)")
    arguments = parser.parse_args()
    threads.wait_passively()
    with threads.use(arguments.threads):
        for hidden in arguments.hidden:
            for batch in arguments.batches:
                flops, step = measure(hidden, batch, arguments.seconds)
                print(json.dumps({"hidden": hidden, "batch": batch, "flops": flops, "ms": step}), flush=True)


def measure(hidden: int, batch: int, seconds: float) -> tuple[int, float]:
    """Return a step's floating-point operations, as the project counts them, and its median milliseconds."""
    import torch
    from torch.nn import functional as F

    from mnist_lightning.images.known import KNOWN
    from mnist_lightning.network import FeedForward

    net = FeedForward(hidden)
    flops = (1 + threads.BACKWARD) * threads.count_flops(net, KNOWN["mnist"].image_shape, batch)
    images = torch.randn(batch, *KNOWN["mnist"].image_shape)
    labels = torch.randint(0, 10, (batch,))
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    steps: list[float] = []
    end = time.perf_counter() + seconds
    while len(steps) < MIN_STEPS or time.perf_counter() < end:
        start = time.perf_counter()
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.append(1000 * (time.perf_counter() - start))
    return flops, statistics.median(steps[1:])


if __name__ == "__main__":
    main()
