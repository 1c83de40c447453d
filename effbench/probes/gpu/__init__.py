"""What the GPU probe is made of, beside NVML itself: which GPU, which sensors and when, whose processes, what it all says."""
