"""How the examples of a source come to the devices, batch by batch."""
