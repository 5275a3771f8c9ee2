"""Training of the nano checkpoint from nothing: `make train-nano`, or `python -m models.nano.recipe`.

The world
    world                 posters: layout, pixels, plans
    codes                 codebook of the plans
    prompts               random posters, prompts, edits
    reading               posters read back from pixels

Shared
    loop                  training loop
    factored              embedding tables
    tokenizer             processor
    planner_sequences     data of the planner
    latents               encoded posters
    batches               data of the renderer

Parts, in training order
    autoencoder           later its decoder alone
    glyphs                glyph encoder
    planner
    vision                vision tokenizer
    renderer
    samples               decoder, on the renderer's latents
    assemble              the checkpoint
"""
