"""The CUDA decode: compiled by NVRTC on the user's machine, one launch from rotated query to rotated-back output."""
