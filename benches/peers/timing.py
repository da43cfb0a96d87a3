"""What the scripts for forward passes share: flags, threads, timing, one JSON line out."""
import json
import os
import statistics
import time


def arguments(parser):
    """Parses, and prepares PyTorch, which must not have been imported."""
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    import torch

    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    return a


def report(a, run):
    """Times `run` after two calls for warmth."""
    import torch

    times = []
    with torch.inference_mode():
        for _ in range(2 + a.reps):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    times = times[2:]
    print(json.dumps({**vars(a), "median_s": statistics.median(times), "min_s": min(times)}))
