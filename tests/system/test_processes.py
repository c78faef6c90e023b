"""Cells work with forks, signals, workers of a DataLoader, and memory that runs out.

Each program runs in a process of its own, which may hang or be killed without ending the tests.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.shared.cpu_kernels import native
from tests.shared.helpers import HANG

pytestmark = [
    pytest.mark.skipif(native is None, reason="the core is not built"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux"),
]

SERVER = """
import json, os, sys
import torch
import snnlstm

for line in sys.stdin:
    program, place = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(f"{place}/{name}", os.O_WRONLY | os.O_CREAT), number)
        status = 1
        try:
            exec(program, {"__name__": "__main__"})
            status = 0
        finally:
            if status:
                sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
START = f"""
import faulthandler
HANG = {HANG}
faulthandler.dump_traceback_later(HANG, exit=True)  # says where it hangs
import os, signal, sys, threading, time
import torch
import snnlstm

torch.manual_seed(0)
cell = snnlstm.SConv2dLSTM(2, 8, 3, threshold=0.05)
x = torch.rand(3, 2, 2, 20, 20)

def train(cell, x=x):
    syn = mem = torch.zeros(0)
    total = 0
    for step in x:
        spk, syn, mem = cell(step, syn, mem)
        total = total + spk.sum() + mem.square().sum()
    total.backward()
    return total.item()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    """Starts a Python that imports torch once, in seconds, and forks for each program."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        yield process
        process.stdin.close()


@pytest.fixture
def in_a_process(server: subprocess.Popen, tmp_path: Path) -> Callable[[str], str]:
    """Returns a function that runs START with a program, and returns their output."""

    def run(program: str) -> str:
        print(json.dumps([START + program, str(tmp_path)]), file=server.stdin, flush=True)
        status = server.stdout.readline().strip()
        out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
        assert status == "0", f"{status}: {out}\n{err[-3000:]}"
        return out

    return run


def test_a_fork_while_another_thread_runs_a_cell(in_a_process):
    """A lock that the other thread held at the fork would never be released in the child."""
    program = """
torch.set_num_threads(1)
expected = train(cell)
busy = snnlstm.SConv2dLSTM(2, 8, 3, threshold=0.05)
big = torch.rand(2, 2, 2, 96, 96)  # of blocks, not of malloc's memory
stop = False

def work():
    while not stop:
        train(busy, big)
        busy.conv.weight.data.mul_(0.999)  # so that the weight is packed anew

thread = threading.Thread(target=work)
thread.start()
hung = 0
for k in range(8):
    time.sleep(0.003)  # each child finds the other thread elsewhere
    child = os.fork()
    if child == 0:
        signal.alarm(HANG // 2)
        ok = train(cell) == expected and train(busy, big) is not None
        os._exit(0 if ok else 3)
    _, status = os.waitpid(child, 0)
    hung += status != 0
stop = True
thread.join()
print("failed", hung)
"""
    assert in_a_process(program).split() == ["failed", "0"]


def test_a_signal_handler_that_calls_the_cell_which_is_running(in_a_process):
    program = """
torch.set_num_threads(1)
big = torch.rand(2, 2, 2, 96, 96)
expected, calls, wrong = train(cell, big), 0, 0

def handler(number, frame):
    global calls, wrong
    calls += 1
    with torch.enable_grad():  # it is off where the handler interrupts a forward pass
        wrong += train(cell, big) != expected
    snnlstm.set_algorithm("auto")
    if calls % 5 == 0:
        snnlstm.empty_cache()
    signal.setitimer(signal.ITIMER_REAL, 0.0007 * (1 + calls % 40))

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001)
while calls < 40:
    wrong += train(cell, big) != expected
    if calls % 3 == 0:
        cell.conv.weight.data.mul_(1.0)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
print(wrong)
"""
    assert in_a_process(program).split() == ["0"]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_cells_in_the_workers_of_a_data_loader(start, tmp_path, in_a_process):
    """A forked worker has no pool of threads, and torch sets one thread for it."""
    program = f"""
from torch.utils.data import DataLoader
sys.path.insert(0, {str(tmp_path)!r})
from worker import Encoded

if __name__ == "__main__":
    torch.manual_seed(0)
    data = Encoded()
    train(data.cell)
    expected = torch.stack([data[k] for k in range(12)])
    loader = DataLoader(data, 4, num_workers=1, multiprocessing_context={start!r})
    print(torch.equal(torch.cat(list(loader)), expected))
"""
    (tmp_path / "worker.py").write_text(
        "import torch, snnlstm\n"
        "class Encoded(torch.utils.data.Dataset):\n"
        "    def __init__(self):\n"
        "        self.cell = snnlstm.SConv2dLSTM(2, 4, 3, threshold=0.05)\n"
        "    def __len__(self):\n"
        "        return 12\n"
        "    def __getitem__(self, k):\n"
        "        self.cell.reset_mem()\n"
        "        with torch.no_grad():\n"
        "            return self.cell(torch.full((4, 1, 2, 9, 9), 1.0 + k))[2]\n"
    )
    assert in_a_process(program).split() == ["True"]


def test_memory_that_runs_out_leaves_state_and_weights_as_they_were(in_a_process):
    program = """
import resource
cell = snnlstm.SConv2dLSTM(2, 16, 3, threshold=0.05)
cell(torch.rand(2, 2, 2, 64, 64))[0].sum().backward()
kept = [*cell.parameters(), cell.syn, cell.mem]
copies = [t.detach().clone() for t in kept]
long = torch.rand(400, 2, 2, 64, 64)
snnlstm.empty_cache()
here = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (here + (100 << 20), resource.RLIM_INFINITY))
raised = ""
try:
    cell(long)
except (MemoryError, RuntimeError) as error:
    raised = "raised"
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
same = cell.syn is kept[-2] and cell.mem is kept[-1] and all(map(torch.equal, kept, copies))
cell.reset_mem()
cell.zero_grad()
cell(torch.rand(5, 2, 2, 64, 64))[0].sum().backward()
print(raised, same, bool(cell.conv.weight.grad.isfinite().all()))
"""
    assert in_a_process(program).split() == ["raised", "True", "True"]


def test_a_pass_under_compiled_autograd(in_a_process):
    """In a fresh process nothing is known of the kernels yet, and sizes change."""
    program = """
from torch._dynamo import compiled_autograd
compiled = torch.compile(backend="eager", dynamic=True)
for side in (20, 9):
    grads = []
    for enabled in (True, False):
        cell.zero_grad()
        loss = 0
        for step in x[..., :side, :]:
            loss = loss + sum(out.sum() for out in cell(step))
        with compiled_autograd._enable(compiled) if enabled else torch.enable_grad():
            loss.backward()
        grads.append(cell.conv.weight.grad.clone())
        cell.reset_mem()
    torch.testing.assert_close(*grads)
print("right")
"""
    assert in_a_process(program).split() == ["right"]
