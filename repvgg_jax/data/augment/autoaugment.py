"""AutoAugment's policy for ImageNet: arXiv:1805.09501, table 9."""

from repvgg_jax.data.augment.kinds import Kind

Entry = tuple[Kind, float, int]
"""Operation, probability, level of 0 … 10."""
SubPolicy = tuple[Entry, Entry]

IMAGENET: tuple[SubPolicy, ...] = (
    ((Kind.POSTERIZE, 0.4, 8), (Kind.ROTATE, 0.6, 9)),
    ((Kind.SOLARIZE, 0.6, 5), (Kind.AUTO_CONTRAST, 0.6, 5)),
    ((Kind.EQUALIZE, 0.8, 8), (Kind.EQUALIZE, 0.6, 3)),
    ((Kind.POSTERIZE, 0.6, 7), (Kind.POSTERIZE, 0.6, 6)),
    ((Kind.EQUALIZE, 0.4, 7), (Kind.SOLARIZE, 0.2, 4)),
    ((Kind.EQUALIZE, 0.4, 4), (Kind.ROTATE, 0.8, 8)),
    ((Kind.SOLARIZE, 0.6, 3), (Kind.EQUALIZE, 0.6, 7)),
    ((Kind.POSTERIZE, 0.8, 5), (Kind.EQUALIZE, 1.0, 2)),
    ((Kind.ROTATE, 0.2, 3), (Kind.SOLARIZE, 0.6, 8)),
    ((Kind.EQUALIZE, 0.6, 8), (Kind.POSTERIZE, 0.4, 6)),
    ((Kind.ROTATE, 0.8, 8), (Kind.COLOR, 0.4, 0)),
    ((Kind.ROTATE, 0.4, 9), (Kind.EQUALIZE, 0.6, 2)),
    ((Kind.EQUALIZE, 0.0, 7), (Kind.EQUALIZE, 0.8, 8)),
    ((Kind.INVERT, 0.6, 4), (Kind.EQUALIZE, 1.0, 8)),
    ((Kind.COLOR, 0.6, 4), (Kind.CONTRAST, 1.0, 8)),
    ((Kind.ROTATE, 0.8, 8), (Kind.COLOR, 1.0, 2)),
    ((Kind.COLOR, 0.8, 8), (Kind.SOLARIZE, 0.8, 7)),
    ((Kind.SHARPNESS, 0.4, 7), (Kind.INVERT, 0.6, 8)),
    ((Kind.SHEAR_X, 0.6, 5), (Kind.EQUALIZE, 1.0, 9)),
    ((Kind.COLOR, 0.4, 0), (Kind.EQUALIZE, 0.6, 3)),
    ((Kind.EQUALIZE, 0.4, 7), (Kind.SOLARIZE, 0.2, 4)),
    ((Kind.SOLARIZE, 0.6, 5), (Kind.AUTO_CONTRAST, 0.6, 5)),
    ((Kind.INVERT, 0.6, 4), (Kind.EQUALIZE, 1.0, 8)),
    ((Kind.COLOR, 0.6, 4), (Kind.CONTRAST, 1.0, 8)),
    ((Kind.EQUALIZE, 0.8, 8), (Kind.EQUALIZE, 0.6, 3)),
)
