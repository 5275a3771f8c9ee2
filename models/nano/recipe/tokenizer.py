"""The planner's tokenizer and processor: a small vocabulary for nano's prompts.

The planner places lines, not letters: the normalizer replaces a quoted string by one token for its length and first
letter, `"HELLO"` by `⟨5⟩h`, and lower-cases the rest.
"""

import json
import re
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GlmImageProcessor, PreTrainedTokenizerFast
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

from models.nano.recipe import codes, prompts
from models.nano.recipe.world import MAX_LETTERS

IMAGE_START, IMAGE_END = codes.CODEBOOK, codes.CODEBOOK + 1
VISION_VOCABULARY = codes.CODEBOOK + 16  # codes, start, end and spare outputs, as in the published model
CHAT_TEMPLATE = (
    "{% for m in messages %}<|user|>\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type']=='image' %}<|dit_token_start|><|image|><|dit_token_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
SPECIAL = ("<|endoftext|>", "<sop>", "<eop>", "<|user|>", "<|image|>")
QUOTES = ('""', "''", "“”", "「」")
FIRST = r"[^\s,.;:)\]\"'”」]"  # of a quoted string
OTHER = "*"  # any first character that is not a letter or a digit


def string_token(letters: int, first: str) -> str:
    """Return the token of a quoted string."""
    return f"⟨{min(letters, MAX_LETTERS)}⟩{first}"


def _normalizer() -> normalizers.Normalizer:
    """Return a normalizer: lower case, then `"hello"` -> ` ⟨5⟩h `."""
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()]
    for opening, closing in QUOTES:
        inside, mark = f"[^{opening}{closing}]", chr(0xE000 + len(steps))
        for letters in range(1, MAX_LETTERS + 1):
            count = f"{{{letters - 1}}}" if letters < MAX_LETTERS else f"{{{letters - 1},}}"
            # Opening quotes neither follow a letter nor precede a space or comma.
            start = f"(?<![a-z0-9]){opening}(?={FIRST}{inside}{count}{closing})"
            steps.append(normalizers.Replace(Regex(start), f" {string_token(letters, mark)}"))
        steps.append(normalizers.Replace(Regex(f"(?<={mark}.){inside}*{closing}"), " "))
        steps.append(normalizers.Replace(Regex(f"(?<={mark})[^a-z0-9]"), OTHER))
        steps.append(normalizers.Replace(mark, ""))
    return normalizers.Sequence(steps)


def _corpus() -> list[str]:
    rng = Random("tokenizer")
    texts = []
    for _ in range(12000):
        poster = prompts.random_poster(rng)
        texts.append(prompts.describe(poster, rng))
        if rng.random() < 0.4:
            texts.append(prompts.random_edit(rng).instruction)
    words = [*prompts.OTHER_COLOUR_WORDS, *prompts.OTHER_SHAPE_WORDS, *prompts.SMALL_WORDS, *prompts.LARGE_WORDS]
    texts += [" ".join([*words, *map(str, range(1, 65))])] * 100
    return [re.sub(r"⟨\d+⟩.", " ", _normalizer().normalize_str(text)) for text in texts]


def in_bytes(text: str) -> str:
    """Return a word as the vocabulary writes it."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of codes, words and quoted strings."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(r"⟨\d+⟩.|[a-z0-9]+|[^\s]"), behavior="removed", invert=True)
    split = pre_tokenizers.Sequence([words, byte_level])
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = _normalizer(), split
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    firsts = codes.LETTERS.lower() + OTHER
    strings = [in_bytes(string_token(n, first)) for n in range(1, MAX_LETTERS + 1) for first in firsts]
    trainer = trainers.BpeTrainer(vocab_size=1100, min_frequency=20, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(_corpus(), trainer)
    learned = learner.get_vocab(with_added_tokens=False)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]

    names = [f"<|dit_token_{i}|>" for i in range(codes.CODEBOOK)] + ["<|dit_token_start|>", "<|dit_token_end|>"]
    names += [f"<|dit_unused_{i}|>" for i in range(codes.CODEBOOK + 2, VISION_VOCABULARY)]
    names += sorted(learned, key=learned.__getitem__) + strings
    # No merges produce the tokens of quoted strings.
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = _normalizer(), split, decoders.ByteLevel()
    special = ["<|dit_token_start|>", "<|dit_token_end|>", *SPECIAL]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|dit_token_start|>", eos_token="<|dit_token_end|>",
        pad_token="<|endoftext|>", padding_side="left",
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )  # fmt: skip


def make_processor() -> GlmImageProcessor:
    image_processor = GlmImageImageProcessorPil(
        patch_size=16, merge_size=1, temporal_patch_size=1, size={"shortest_edge": 64 * 64, "longest_edge": 2048 * 2048}
    )
    return GlmImageProcessor(image_processor=image_processor, tokenizer=make_tokenizer(), chat_template=CHAT_TEMPLATE)
