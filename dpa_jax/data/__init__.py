"""Data sets: sources, feeds that bring batches to the devices, and the augmentation of images."""
