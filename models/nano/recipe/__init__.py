"""Training of the nano checkpoint, from nothing: `make train-nano` or `python -m models.nano.recipe`.

The world it draws
    world.py              posters: layout, pixels and plan codes
    codes.py              what each plan code means
    prompts.py            random posters, prompts and edits, split into training and held-out
    reading.py            the poster read back from pixels, for scoring

Shared by the parts
    loop.py               the training loop: seeded, resumable
    factored.py           embedding tables that are sums of factors
    tokenizer.py          the planner's tokenizer and processor
    latents.py            posters encoded once by the autoencoder, in shards
    batches.py            the renderer's batches, drawn from those shards
    planner_sequences.py  the planner's token sequences

The parts, in the order in which `__main__.py` trains them
    autoencoder.py        encoder and decoder on crops; later the decoder alone on whole posters
    glyphs.py             glyph encoder
    planner.py            planner
    vision.py             vision tokenizer, for edits
    renderer.py           renderer, on the latents and with the glyph encoder
    samples.py            decoder again, on latents that the renderer makes
    assemble.py           all parts as one checkpoint in the published layout
"""
