"""The MLLM algorithms: one file each."""
