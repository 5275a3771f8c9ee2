"""Training of the nano checkpoint: `make train-nano`.

The world: world (posters, pixels, plans), codes (codebook), prompts, reading (posters read back from pixels).
Shared: loop, factored (embedding tables), tokenizer, planner_sequences (planner's data), latents, batches (renderer's
data). Parts in training order: autoencoder, glyphs, planner, vision, renderer, samples, assemble.
"""
