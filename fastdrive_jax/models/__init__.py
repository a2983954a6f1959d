"""Model code: Qwen2.5-VL, DINOv2 and the layers they share, with weights in and out."""
