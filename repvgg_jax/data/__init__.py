"""Data: sources of images -> batches of global arrays -> augmentation on the device.

The host decodes, crops and resizes images to uint8, and rotates, blurs and flips those with masks.
Normalization and all other augmentation run inside the compiled step. Order and random crops are
functions of the seed and of the position in the data, augmentation of the seed and the step,
whatever the number of workers and processes.
"""
