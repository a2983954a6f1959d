"""OpenVLA and OpenVLA-OFT: pictures and an instruction in, robot actions out."""
