"""Qwen2.5-VL in Linen: vision encoder, decoder, and the driving VLA made of both."""
