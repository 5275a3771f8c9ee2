"""The second stage: denoises the latents of many images, step by step."""
