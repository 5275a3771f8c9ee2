"""Training of the nano checkpoint: `make train-nano`.

The world: world (posters, pixels, plans), codes (codebook), facts (what a prompt says), reading (posters read back from
pixels). Prompts: prompts (the small grammar, edits); layouts, phrases, slips, free_prompts (newcomers' sentences).
Shared: loop, factored (embedding tables), tokenizer, planner_sequences (planner's data), latents, batches (renderer's
data). Parts in training order: autoencoder, glyphs, planner, vision, renderer, samples, assemble; continuation trains a
checkpoint further. planning scores a planner in seconds.
"""
