"""From a trained network to files that other programs run: read, fuse, prove, write."""
