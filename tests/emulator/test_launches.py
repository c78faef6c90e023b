"""There are few launches, and sizes are counted rightly.

Nothing runs here: the emulator only notes each launch, so that sizes cost nothing. Calls that are
too large to be counted are refused, and large calls within the limits are not.
"""

import os
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import snnlstm
from snnlstm.native import cuda
from tests.emulator.builder import HERE, ROOT, run
from tests.emulator.launches import calls, plan
from tests.emulator.modes import MODES


@pytest.mark.parametrize(("pool", "T"), [(0, 1), (0, 3), (1, 3), (2, 3)])
@pytest.mark.parametrize(("matrix", "kind"), [(0, "fma"), (1, "mma")])
def test_how_many_launches_a_sequence_takes(core, matrix, kind, pool, T):
    found = calls(core, matrix, T=T, Cin=8, pool=pool, pool_size=(1 + (pool > 0),) * 2)
    pack, fires = f"pack weight ({kind})", pool > 0
    assert [launch.kernel for launch in found] == [
        pack, *T * [f"forward step ({kind})", *["fire"] * fires],
        pack, *T * [*["spread spikes"] * fires, f"backward step ({kind})"],
        f"data gradient ({kind})", f"weight gradient ({kind})", "add gradients",
    ]  # fmt: skip


@pytest.mark.parametrize("facts", [{"H": 129, "W": 1}, {"H": 1, "W": 32}, {"H": 32, "W": 1}])
def test_tiles_reach_over_the_samples_of_a_batch_of_rows(core, facts):
    """Rows of 129 and 32 pixels would fill 20 and 25 % of tiles of their own."""
    pixels = 128 * facts["H"] * facts["W"]
    steps = [one for one in calls(core, N=128, T=1, **facts) if "step" in one.kernel]
    assert {128 * one.blocks / pixels < 1.25 for one in steps} == {True}


def test_a_compiled_loop_launches_as_often_as_its_sequence(core):
    cell = snnlstm.SConv2dLSTM(16, 32, 3, threshold=0.05, reset_mechanism="subtract")
    x, zeros = torch.zeros(3, 2, 16, 8, 8), torch.zeros(2, 32, 8, 8)

    def loop(x):
        syn, mem, out = zeros, zeros.clone(), []
        for x_t in x:
            spk, syn, mem = cell(x_t, syn, mem)
            out.append(spk)
        return torch.stack(out)

    def sequence(x):
        return cell(x, zeros, zeros.clone())[0]

    counts = []
    with MODES["tf32"].running(core):
        for function in (sequence, torch.compile(loop, backend="snnlstm"), loop):
            with core.dry() as found:
                function(x).sum().backward()
            counts.append(Counter(launch.kernel for launch in found))
    assert counts[0] == counts[1]
    assert counts[2].total() > counts[0].total()


def reason(core, **facts):
    found = (plan(core, backward=a_pass, **facts).reason_against for a_pass in (False, True))
    return next(filter(None, found), "")


def test_training_needs_both_passes():
    """A call without gradients runs where only the backward pass cannot."""
    cores = [SimpleNamespace(reason_against=reason) for reason in ("", "too large")]
    passes = cuda.Passes.__new__(cuda.Passes)
    passes._core = cores.__getitem__
    assert [passes.reason_against(training) for training in (False, True)] == [None, "too large"]


@pytest.mark.parametrize(("inputs", "channels"), [(3, 16384), (1 << 22, 8)])
@pytest.mark.parametrize("matrix", [0, 1])
def test_many_channels_fit_every_grid(core, matrix, inputs, channels):
    """The second and third axis of a grid have fewer than 65,536 blocks."""
    launches = calls(core, matrix, Cin=inputs, C=channels, H=2, W=2)
    assert any(launch.kernel == "add gradients" for launch in launches)


@pytest.mark.parametrize(
    ("fits", "over", "subject"),
    [
        ({"C": 8, "H": 8191, "W": 8192}, {"C": 8, "H": 8192, "W": 8192}, "gates"),
        ({"Cin": 32767, "H": 256, "W": 256}, {"Cin": 32768, "H": 256, "W": 256}, "input image"),
        ({"N": 1 << 20, "T": 1 << 10}, {"N": 1 << 20, "T": 1 << 11}, "blocks"),
        ({"dilation": (1 << 29, 1)}, {"dilation": (1 << 30, 1)}, "of the rows"),
        ({"dilation": (1, 1 << 29)}, {"dilation": (1, 1 << 30)}, "of the columns"),
        ({"stride": (1, 1 << 23)}, {"stride": (1, 1 << 24)}, "of the columns"),
    ],
)
def test_the_limit_of_each_size(core, fits, over, subject):
    assert reason(core, **fits) == ""
    assert subject in reason(core, **over)
    calls(core, **fits)
    with pytest.raises(RuntimeError, match=subject):
        calls(core, **over)


def test_the_sums_of_a_large_kernel_fit_into_the_cards_shared_memory(core):
    """The gradient of an input channel passes through it; a T4 has 64 KiB for a block."""
    core.device(75, shared_bytes=64 * 1024)
    doubles = {"dtype": 1, "H": 46, "W": 46}
    assert reason(core, kernel=(89, 91), **doubles) == ""
    calls(core, kernel=(89, 91), **doubles)
    assert "66248 bytes of shared memory" in reason(core, kernel=(91, 91), **doubles)
    assert plan(core, kernel=(91, 91), **doubles).reason_against == "", "forward"
    core.device(75)
    assert reason(core, kernel=(91, 91), **doubles) == ""


def test_no_launch_has_more_shared_memory_than_the_emulated_card(core):
    core.device(shared_bytes=48 * 1024)
    calls(core)
    core.settings.shared_bytes = 1024
    with pytest.raises(RuntimeError, match=r"forward.*card has at most 1024"):
        calls(core)


@pytest.mark.parametrize("dilation", [(700, 1), (1, 5000), (3000, 4001), (8000, 8000)])
@pytest.mark.parametrize("matrix", [0, 1])
def test_neighbourhoods_beyond_any_shared_memory(core, matrix, dilation):
    """Counted in 31 bits, that of a tile would wrap around and seem to fit."""
    # In a smaller image no tap but the middle one would meet a pixel, and the others are skipped.
    image = {"H": dilation[0] + 1, "W": dilation[1] + 1}
    launches = calls(core, matrix, dilation=dilation, Cin=8, T=2, **image)
    assert all(launch.shared_bytes <= 163 * 1024 for launch in launches)
    if max(dilation) >= 3000:
        assert not any("step (mma" in launch.kernel for launch in launches)


def test_the_workspace_of_inference_does_not_grow_with_time(core):
    assert plan(core, Cin=8, T=1 << 20).workspace <= plan(core, Cin=8, T=16).workspace


def test_limits_errors_and_threads_on_a_runtime_that_runs_nothing(tmp_path):
    program = tmp_path / "launches"
    folders = [HERE / "runtime", ROOT / "csrc" / "cuda"]
    flags = ["-std=c++17", "-O1", "-g", "-D__CUDACC__", "-pthread"]
    flags += [f"-I{folder}" for folder in folders]
    run([os.environ.get("CXX", "g++"), *flags, folders[0] / "launches.cpp", "-o", program])
    run([program])
