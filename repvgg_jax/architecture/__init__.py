"""What an architecture is: a `Variant`, unrolled into one `Layer` per block.

`networks` has the layers of MobileOne, QARepVGG, RepOpt-VGG and RepViT; `installed` finds blocks
that other packages name.

The model, the cost model and the weight readers all walk the one list of a variant's layers, so
they cannot disagree about a shape.
"""

from repvgg_jax.architecture.layer import Layer, SqueezeExcite, residual_starts
from repvgg_jax.architecture.variant import Dilation, Variant

__all__ = ["Dilation", "Layer", "SqueezeExcite", "Variant", "residual_starts"]
