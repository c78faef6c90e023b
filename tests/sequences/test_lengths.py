"""With lengths= each sample of a batch is as it is alone, and its padding does nothing."""

from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor, nn

import snnlstm
from snnlstm.calls.lengths import CheckedLengths, checked_lengths
from tests.sequences.by_length import CELLS, LENGTHS, TIME, check, unpadded
from tests.sequences.stacks import NEURONS, check_alone, delta_leaky, fold_up_to
from tests.shared.helpers import close, ours, same, steps


@pytest.mark.emulator_long
@pytest.mark.parametrize("record", [False, True], ids=["last", "record"])
@pytest.mark.parametrize("options", CELLS.values(), ids=CELLS)
def test_each_sample_is_as_it_is_alone(backend, options, record):
    check(record, **options)


def cell_and_input(**options: Any) -> tuple[snnlstm.SConv2dLSTM, Tensor]:
    return ours(**options), steps(TIME, len(LENGTHS), 2, 6, 7)


def test_a_cell_goes_on_from_each_samples_last_state(backend):
    cell, x = cell_and_input(batch_first=True)
    whole = cell(x.transpose(0, 1), lengths=LENGTHS)
    backend.check(cell.path)
    cell.reset_mem()
    parts = [
        cell(piece.transpose(0, 1), lengths=(torch.tensor(LENGTHS) - t).clamp(0, 2))
        for t, piece in zip(range(0, TIME, 2), x.split(2), strict=True)
    ]
    same(parts[-1][1:], whole[1:])
    same(whole[1:], (cell.syn, cell.mem))
    assert torch.equal(torch.cat([part[0] for part in parts], 1), whole[0])


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (
            [0, 5, *[1] * 4],
            ValueError,
            "lengths must lie between 0 and x's number of steps, 4, got 5",
        ),
        ([1, -1, *[1] * 4], ValueError, "lengths must lie between 0 and .* 4, got -1"),
        ([1, 2], ValueError, r"lengths must have shape \(6,\), one for each sample, got \(2,\)"),
        ([1.0] * 6, TypeError, "lengths must be ints, got a tensor of torch.float32"),
        (torch.ones(6) > 0, TypeError, "lengths must be ints, got a tensor of torch.bool"),
        ("all", TypeError, "lengths must be ints, one for each sample, got 'all'"),
        (torch.ones(6, dtype=torch.int64, device="meta"), ValueError, "lengths must be on the CPU"),
        (
            torch.ones(6, dtype=torch.int64).to_sparse(),
            TypeError,
            r"lengths must be dense, as lengths.to_dense\(\) is, got layout torch.sparse_coo",
        ),
        (torch.tensor([2**63] * 6, dtype=torch.uint64), ValueError, "4, got 9223372036854775808"),
    ],
)
def test_wrong_lengths_are_named_and_the_state_stays(lengths, error, message):
    cell, x = cell_and_input()
    before = [state.clone() for state in cell(x)[1:]]
    for call in (cell, snnlstm.Sequential(cell)):
        with pytest.raises(error, match=message):
            call(x, lengths=lengths)
    same((cell.syn, cell.mem), before)
    with pytest.raises(ValueError, match=r"lengths needs a sequence: x of shape \(T, N, Cin, H, W"):
        cell(x[0], lengths=LENGTHS)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "int16"])
def test_ints_of_any_type_serve(dtype):
    cell, x = cell_and_input()
    expected = cell(x, lengths=LENGTHS)
    cell.reset_mem()
    same(cell(x, lengths=torch.tensor(LENGTHS, dtype=getattr(torch, dtype))), expected)


def test_lengths_follow_x_whatever_the_default_device():
    cell, x = cell_and_input()
    expected = cell(x, lengths=LENGTHS, record=True)
    cell.reset_mem()
    with torch.device("meta"):
        same(cell(x, lengths=LENGTHS, record=True), expected)
    assert cell(x[:, :0], lengths=[])[0].shape[:2] == (TIME, 0)
    spk = cell.to("meta")(x.to("meta"), lengths=LENGTHS)[0]
    assert (spk.shape, spk.is_meta) == (expected[0].shape, True)


def test_half_types_and_signals(backend):
    cell = snnlstm.SConv1dLSTM(2, 3, 3, threshold=0.1, dtype=torch.bfloat16)
    x = steps(TIME, len(LENGTHS), 2, 9).bool()
    out = cell(x, lengths=LENGTHS, record=True)
    for n, length in enumerate(LENGTHS):
        cell.reset_mem()
        expected = cell(x[:length, n : n + 1], record=True)
        for whole, by_itself in zip(out, expected, strict=True):
            close(whole[:length, n : n + 1], by_itself, atol=0.02)
            assert length == 0 or whole is out[0] or torch.equal(whole[-1, n], whole[length - 1, n])
        assert not out[0][length:, n].any()


def network() -> list[nn.Module]:
    torch.manual_seed(4)
    return [
        nn.Conv2d(2, 2, 3),
        ours(init_hidden=True),
        nn.Flatten(),
        nn.Linear(60, 5),
        snntorch.Leaky(0.8, threshold=0.2, init_hidden=True),
        nn.Linear(5, 4),
        snntorch.Leaky(0.7, learn_beta=True),
    ]


def shared() -> list[nn.Module]:
    layers = network()
    layers.insert(5, layers[4])
    return layers


STACKS = {
    "layers": network,
    "steps": shared,
    "no neuron at the end": lambda: [ours(init_hidden=True), nn.Flatten(), nn.Linear(126, 3)],
    "Leaky in plain torch": lambda: [
        snnlstm.Leaky(0.8, threshold=0.2, learn_beta=True, reset_delay=False),
    ],
    "DeltaLeaky": lambda: delta_leaky(84),
    **{
        name: lambda make=make: [nn.Flatten(), nn.Linear(84, 5), make()]
        for name, make in NEURONS.items()
    },
}


@pytest.mark.parametrize("largest", [0, 1 << 20], ids=["step", "fold"])
@pytest.mark.parametrize("name", STACKS)
def test_a_stack_is_for_each_sample_as_it_is_alone(name, largest, monkeypatch):
    fold_up_to(largest, monkeypatch)
    torch.manual_seed(2)
    check_alone(STACKS[name]())


def convlstm_and_input(hooked: bool) -> tuple[snnlstm.ConvLSTM, Tensor]:
    """Returns a stack of two layers, whose first is called step by step if it is hooked."""
    torch.manual_seed(1)
    net = snnlstm.ConvLSTM(2, [3, 4], 3, 2, return_all_layers=True, dtype=torch.float64)
    if hooked:
        net.cell_list[0].register_forward_hook(lambda *given: None)
    return net, steps(TIME, len(LENGTHS), 2, 6, 7).double()


@pytest.mark.emulator_long
@pytest.mark.parametrize("hooked", [False, True], ids=["sequence", "steps"])
def test_a_convlstm_is_for_each_sample_as_it_is_alone(backend, hooked):
    net, x = convlstm_and_input(hooked)
    x.masked_fill_(~unpadded(), torch.nan)
    outs, states = net(x, lengths=LENGTHS)
    sum(h.sum() for h in [*outs, *states[1]]).backward()
    grads = [p.grad for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    for n, length in enumerate(LENGTHS):
        assert not any(out[n, length:].any() for out in outs)
        if length == 0:
            continue
        alone_outs, alone_states = net(x[:length, n : n + 1])
        close([out[n : n + 1, :length] for out in outs], alone_outs)
        close([[s[n : n + 1] for s in pair] for pair in states], alone_states)
        sum(h.sum() for h in [*alone_outs, *alone_states[1]]).backward()
    close(grads, [p.grad for p in net.parameters()], atol=1e-9)
    with pytest.raises(ValueError, match="lengths must lie between 0 and"):
        net(x, lengths=[5] * 6)


@pytest.mark.emulator_long
@pytest.mark.parametrize("hooked", [False, True], ids=["sequence", "steps"])
def test_a_convlstm_records_the_states_of_every_step(backend, hooked):
    """A sample's states after its own last step are those of that step."""
    net, x = convlstm_and_input(hooked)
    for lengths in (None, LENGTHS):
        outs, states = net(x, lengths=lengths, record=True)
        for cell, input_, out, (h, c) in zip(
            net.cell_list, (x, states[0][0].transpose(0, 1)), outs, states, strict=True
        ):
            state, every = cell.init_hidden(len(LENGTHS), (6, 7)), []
            for t, x_t in enumerate(input_):
                after = cell(x_t, state)
                going = True if lengths is None else unpadded()[t]
                state = [torch.where(torch.as_tensor(going), *pair)
                         for pair in zip(after, state, strict=True)]  # fmt: skip
                every.append(state)
            close([h, c], [torch.stack(parts, 1) for parts in zip(*every, strict=True)])
            close(out, h if lengths is None else torch.where(unpadded().transpose(0, 1), h, 0))
    backend.check(net.cell_list[1].path)
    with pytest.raises(TypeError, match="record must be a bool, got 2"):
        net(x, record=2)


def test_a_stack_checks_lengths_once_and_a_layer_checks_those_of_other_sequences():
    lengths, cpu = torch.tensor([3, 1]), torch.device("cpu")
    checked = CheckedLengths(lengths, 3)
    assert checked_lengths(checked, 3, 2, cpu, False) is lengths
    for time, batch, message in ((2, 2, "between 0 and x's number of steps, 2"), (3, 4, r"\(4,\)")):
        with pytest.raises(ValueError, match=message):
            checked_lengths(checked, time, batch, cpu, False)
