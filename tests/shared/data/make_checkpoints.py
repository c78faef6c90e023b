"""Writes checkpoints of a release, which tests/snntorch/test_checkpoints.py loads.

    pip install --no-deps --target OLD snntorch==0.9.4
    PYTHONPATH=OLD python tests/shared/data/make_checkpoints.py snntorch
    PYTHONPATH=. python tests/shared/data/make_checkpoints.py snnlstm

A file holds for each cell its arguments, its state_dict, an input and the results of three steps.
"""

import importlib
import sys
import warnings
from pathlib import Path

import torch

CELLS = {
    "plain": {"threshold": 0.05},
    "learned, subtract": {
        "threshold": 0.05,
        "learn_threshold": True,
        "reset_mechanism": "subtract",
    },
    "zero, max_pool": {"threshold": 0.02, "reset_mechanism": "zero", "max_pool": 2},
    "no bias, avg_pool": {"threshold": 0.05, "bias": False, "avg_pool": 2},
    "a threshold a channel": {"threshold": torch.tensor([0.02, 0.05, 0.1]).view(3, 1, 1)},
}


def made(library: str) -> dict:
    cell_of = importlib.import_module(library).SConv2dLSTM
    found = {}
    for seed, (name, arguments) in enumerate(CELLS.items()):
        torch.manual_seed(seed)
        cell = cell_of(2, 3, 3, **arguments)
        x = (torch.rand(3, 2, 2, 5, 6) < 0.4).float()
        with torch.no_grad():
            out = [cell(step) for step in x][-1]
        kept = {
            key: value for key, value in arguments.items() if isinstance(value, (bool, str, int))
        }
        found[name] = {
            "arguments": {**kept, "threshold": 1.0},  # the state_dict brings the right one
            "state_dict": cell.state_dict(),
            "x": x,
            "out": list(out),
        }
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    (library,) = sys.argv[1:]
    version = importlib.import_module(library).__version__
    path = Path(__file__).with_name(f"{library}-{version}.pt")
    torch.save(made(library), path)
    print(path)
