"""PyTorch's side of the comparison: the protocol of README.md. Run by run.py with the Python of `--torch-venv`.

The cases stand in torch_ops.py, torch_vit.py, torch_resnet.py and torch_flip.py."""

import json
import os
import sys
import time

import torch

import torch_flip, torch_ops, torch_resnet, torch_vit  # noqa: E401, F401 -- they register their cases
from torch_cases import CASES, Unsupported

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def timed(run):
    start = time.perf_counter()
    out = run()
    del out
    return time.perf_counter() - start


def squares(tensors):
    return [t.double().square().mean().item() for t in tensors]


def prepare(name, only, like):
    """Builds and warms up a case. The check of a variant: what its first two runs returned, as mean squares."""
    if name not in CASES:
        return [], {"unsupported": "not written"}
    runs, info = [], []
    for variant, run in CASES[name]().items():
        if only not in (None, variant) or like not in variant:
            continue
        if only is None and hasattr(run, "reset"):
            run.reset()
        check = squares(run())
        start = time.perf_counter()
        second = run()
        seconds = time.perf_counter() - start
        check += squares(second)
        del second
        if seconds < 0.5:
            seconds = min(timed(run) for _ in range(3))
        runs.append(run)
        info.append({"name": variant, "seconds": seconds, "check": check})
    return runs, {"variants": info}


def main():
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    say = lambda answer: print(json.dumps(answer), file=out, flush=True)
    say({"peer": "PyTorch", "version": torch.__version__, "threads": torch.get_num_threads()})
    runs = []
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                runs = []
                runs, answer = prepare(request["case"], request.get("variant"), request.get("like") or "")
            else:
                run = runs[request["run"]]
                answer = {"times": [timed(run) for _ in range(request["n"])]}
        except Unsupported as why:
            answer = {"unsupported": str(why)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        say(answer)


main()
