"""Data: sources of images -> batches of global arrays -> augmentation on the device.

The host only reads uint8 images; everything else runs inside the compiled step. Order
and augmentation are functions of (seed, epoch, index) alone, whatever the number of
workers, processes or devices.
"""
