"""The nuScenes v1.0 layout: tables, key frames, CAN bus, map layers, and the source of records."""
