"""Comparison of spikes and other discontinuous results, with a boundary band.

Two implementations round differently, so a potential that lies within rounding of the
threshold may spike in one and not in the other. Outside of a band around the threshold
spikes must agree exactly. Inside it a difference must be a true crossing: the potential that
the implementation itself computed must lie on the side that its spike says.
"""

import torch
from torch import Tensor


def assert_spikes(
    spk: Tensor,
    potential: Tensor,
    exact: Tensor,
    threshold: Tensor | float,
    band: float = 2e-6,
    allowed: float = 0.02,
) -> None:
    """Check spikes of 0 and 1 against an exact potential.

    Parameters
    ----------
    spk : Tensor
        Spikes under test.
    potential : Tensor
        The (pooled) potential from which the implementation under test fired.
    exact : Tensor
        The same in float64, computed independently.
    threshold : Tensor or float
    band : float
        Half the width of the band.
    allowed : float
        Largest fraction of spikes that may lie in the band: more would hide a defect.
    """
    expected = exact - threshold > 0
    flipped = spk.bool() != expected
    inside = (exact - threshold).abs() <= band
    assert not (flipped & ~inside).any(), (
        f"{int((flipped & ~inside).sum())} spikes differ outside of the band; the farthest is "
        f"{float((exact - threshold).abs()[flipped].max()):.3g} from the threshold"
    )
    own = potential - torch.as_tensor(threshold, dtype=potential.dtype) > 0
    assert torch.equal(spk.bool(), own), "a spike contradicts the potential it was fired from"
    assert inside.double().mean() <= allowed, "too many potentials in the band"


def assert_quantised(value: Tensor, exact: Tensor, levels: Tensor, band: float = 2e-6) -> None:
    """Check quantised values against the exact ones from before the quantisation.

    Every value must be a level, and no other level may be nearer by more than `band`.
    """
    levels = levels.double()
    nearest = (exact[..., None].double() - levels).abs().min(-1).values
    assert torch.isin(value.double(), levels.to(value.dtype).double()).all(), "not a level"
    excess = (value.double() - exact).abs() - nearest
    assert excess.max() <= 2 * band, f"a level is not the nearest, by {float(excess.max()):.3g}"
