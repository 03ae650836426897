"""MobileOne on ImageNet, 300 epochs: s0, s1, s2, s3 or s4.

    python train.py --config configs/mobileone.py:s1 --workdir runs/mobileone_s1

The authors' weights have a top-1 of 71.4 % (s0), 75.8 % (s1), 77.5 % (s2), 78.0 % (s3) and 79.4 %
(s4) by timm's measurement; nothing was measured here. `mobileone_300` says what differs from the
authors' training.
"""

from repvgg_jax.train.config import mobileone_300


def get_config(size: str = "s0"):
    return mobileone_300(size)
