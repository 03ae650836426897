"""Semantic segmentation: PSPNet on RepVGG or ResNet, trained in branches, deployed fused.

`network` has the model, `resnet` the ResNets that the paper compares with, and `resize` the
resampling of feature maps. `weights` starts a segmenter from a classifier. `loss` and `metrics`
are what training minimizes and reports, and `inference` evaluates whole images, in one pass or in
windows.
"""
