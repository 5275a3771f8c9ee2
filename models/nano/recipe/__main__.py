"""Train the nano checkpoint from nothing.

    python -m models.nano.recipe                    all parts, then the checkpoint
    python -m models.nano.recipe planner            one part; those on one line below can run side by side
    python -m models.nano.recipe --start FOLDER     planner, renderer and decoder of a checkpoint, further

        autoencoder  glyphs  planner  vision
        latents                                    needs the autoencoder
        renderer  decoder                          need the latents; the renderer also the glyphs
        samples                                    needs the renderer and the decoder, which it trains further
        assemble                                   needs all

An interrupted part is resumed from its state in --work. The checkpoint is written to --out.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import GlmImageForConditionalGeneration

from models.nano import CHECKPOINT
from models.nano.recipe import autoencoder, continuation, glyphs, latents, planner, renderer, samples, vision
from models.nano.recipe.assemble import assemble
from models.nano.recipe.loop import trained
from models.nano.recipe.tokenizer import make_tokenizer

CROP_STEPS, DECODER_STEPS = 2500, 3000
GLYPH_STEPS = 1000
PLANNER_STEPS, LINE_STEPS, WHOLE_PLANNER_STEPS = 1500, 700, 1000
VISION_STEPS = 2500
READING_STEPS, RENDERER_STEPS = 400, 5000
SHARDS = {(256, 256): 40, (384, 256): 4, (256, 384): 4, (512, 512): 6}
EDIT_SHARDS = 12
SAMPLE_SHARDS = {(256, 256): 10, (384, 256): 1, (256, 384): 1, (512, 512): 1}
SAMPLE_STEPS = 1200


class Training:
    """Parts by name; each trains what is missing."""

    def __init__(self, work: Path, out: Path):
        self.work, self.out = work, out
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = make_tokenizer()

    def autoencoder(self) -> AutoencoderKL:
        return autoencoder.train_on_crops(self.work, CROP_STEPS)

    def encoder(self) -> AutoencoderKL:
        """Return the autoencoder whose encoder makes the latents."""
        model = autoencoder.make()
        model.load_state_dict(trained(self.work, "autoencoder-crops"))
        return model

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [c] of latents."""
        return latents.statistics(self.work)

    def glyphs(self) -> nn.Module:
        return glyphs.train_glyphs(self.work, GLYPH_STEPS)

    def planner(self) -> planner.TrainedPlanner:
        return planner.train_planner(self.tokenizer, self.work, PLANNER_STEPS, LINE_STEPS, WHOLE_PLANNER_STEPS)

    def vision(self) -> vision.TrainedTokenizer:
        model = GlmImageForConditionalGeneration(planner.make_config(self.tokenizer))
        return vision.train_vision(model, self.work, VISION_STEPS)

    def latents(self) -> None:
        """Compute missing latents."""
        model = self.encoder()
        for (width, height), count in SHARDS.items():
            for index in range(count):
                latents.make_shard(model, self.work, width, height, False, index)
        for index in range(EDIT_SHARDS):
            latents.make_shard(model, self.work, 256, 256, True, index)

    def renderer(self) -> renderer.TrainedRenderer:
        encoder = glyphs.trained_encoder(self.work)
        return renderer.train_renderer(encoder, self.work, *self.statistics(), READING_STEPS, RENDERER_STEPS)

    def decoder(self) -> AutoencoderKL:
        return autoencoder.train_decoder(self.encoder(), self.work, DECODER_STEPS)

    def samples(self) -> AutoencoderKL:
        trained_renderer = self.renderer().eval()
        for size, count in SAMPLE_SHARDS.items():
            for index in range(count):
                samples.make_shard(trained_renderer, self.work, size, index, *self.statistics())
        return samples.train_decoder(self.decoder(), self.work, SAMPLE_SHARDS, SAMPLE_STEPS)

    def assemble(self) -> None:
        assemble(self.out, self.planner(), self.vision(), self.renderer(), self.samples(), *self.statistics())
        print(f"Wrote the checkpoint to {self.out}")


class Continuation(Training):
    """Trains planner, renderer and decoder of a checkpoint further; the other parts stay."""

    HINT_STEPS, PLANNER_STEPS, RENDERER_STEPS = 90, 4000, 2500

    def __init__(self, work: Path, out: Path, start: Path):
        super().__init__(work, out)
        self.start = start

    def autoencoder(self) -> AutoencoderKL:
        return continuation.load_autoencoder(self.start)[0]

    encoder = decoder = autoencoder

    def statistics(self) -> tuple[Tensor, Tensor]:
        return continuation.load_autoencoder(self.start)[1:]

    def glyphs(self) -> nn.Module:
        return continuation.load_renderer(self.start).glyphs

    def planner(self) -> planner.TrainedPlanner:
        def start(model: planner.TrainedPlanner) -> None:
            continuation.load_planner(model, self.tokenizer, self.start)

        return planner.continue_planner(self.tokenizer, self.work, start, self.HINT_STEPS, self.PLANNER_STEPS)

    def vision(self) -> vision.TrainedTokenizer:
        return continuation.load_vision(self.tokenizer, self.start)

    def renderer(self) -> renderer.TrainedRenderer:
        model = continuation.load_renderer(self.start)
        return renderer.continue_renderer(model, self.work, *self.statistics(), self.RENDERER_STEPS)


def main() -> None:
    parts = ("autoencoder", "glyphs", "planner", "vision", "latents", "renderer", "decoder", "samples", "assemble")
    parser = argparse.ArgumentParser(
        prog="python -m models.nano.recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="*", choices=[*parts, []], metavar="PART", help="default: all")
    parser.add_argument("--work", type=Path, default=Path("out/nano"), help="training state (default %(default)s)")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="checkpoint folder; default: the shipped one")
    parser.add_argument("--start", type=Path, help="checkpoint to train further; default: from nothing")
    parser.add_argument("--threads", type=int, help="CPU threads; default: one per core")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    training = Training(arguments.work, arguments.out)
    if arguments.start:
        training = Continuation(arguments.work, arguments.out, arguments.start)
    for name in arguments.part or parts:
        part: Callable[[], object] = getattr(training, name)
        part()


if __name__ == "__main__":
    main()
