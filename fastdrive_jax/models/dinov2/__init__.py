"""DINOv2 in Linen."""
