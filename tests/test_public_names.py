"""The public names: what exists keeps its spelling, and nothing becomes public unnoticed."""

import normkit

NAMES = """
    BNP LangevinBNP SGDG AdamG
    BatchRenorm1d BatchRenorm2d BatchRenorm3d BatchlessNorm1d BatchlessNorm2d BatchlessNorm3d InputNorm
    FilterResponseNorm1d FilterResponseNorm2d FilterResponseNorm3d
    LpNorm1d LpNorm2d LpNorm3d NoisyBatchNorm1d NoisyBatchNorm2d NoisyBatchNorm3d
    apply handle recipes attach initialize revisit param_groups scale_invariance
    convert revert describe fold recalibrate
    doctor functional instruments moments
"""


def test_the_public_names_are_these():
    assert sorted(normkit.__all__) == sorted(NAMES.split())
    assert all(getattr(normkit, name) is not None for name in normkit.__all__)
