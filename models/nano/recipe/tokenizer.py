"""The planner's tokenizer and processor: a small vocabulary for nano's prompts.

The planner places lines, not letters: the normalizer replaces a quoted string by one token for its length and first
letter, `"HELLO"` by `⟨5⟩h`, and lower-cases the rest. Of strings of narrow letters, over ten, the token has the half of
the alphabet: `"GOOD MORNING"` is `⟨12⟩a`.
"""

import json
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GlmImageProcessor, PreTrainedTokenizerFast
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

from models.nano.recipe import codes, free_prompts, phrases, prompts, slips
from models.nano.recipe.world import MAX_LETTERS, WIDE_LETTERS

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
HALF_NAMES = "an"
LEARNED_WORDS = 1000  # and pieces of words: a row each in the table of 30 MB


def string_token(letters: int, first: str) -> str:
    """Return the token of a quoted string."""
    return f"⟨{min(letters, MAX_LETTERS)}⟩{first}"


def strings() -> dict[str, tuple[int, int]]:
    """Return the length and the factor "initial" of every token of a string."""
    firsts = enumerate(codes.LETTERS.lower() + OTHER, 1)
    halves = enumerate(HALF_NAMES, 1 + codes.INITIALS)
    short = {string_token(n, first): (n, i) for i, first in firsts for n in range(1, WIDE_LETTERS + 1)}
    return short | {
        string_token(n, half): (n, i) for i, half in halves for n in range(WIDE_LETTERS + 1, MAX_LETTERS + 1)
    }


def _normalizer() -> normalizers.Normalizer:
    """Return a normalizer: lower case, then `"hello"` -> ` ⟨5⟩h `."""
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()]

    def replace(pattern: str, content: str) -> None:
        steps.append(normalizers.Replace(Regex(pattern), content))

    short, long = "\ue000", "\ue001"  # before the first character
    for opening, closing in QUOTES:
        inside = f"[^{opening}{closing}]"
        for letters in range(1, MAX_LETTERS + 1):
            count = f"{{{letters - 1}}}" if letters < MAX_LETTERS else f"{{{letters - 1},}}"
            mark = short if letters <= WIDE_LETTERS else long
            # Opening quotes neither follow a letter nor precede a space or comma.
            start = f"(?<![a-z0-9]){opening}(?={FIRST}{inside}{count}{closing})"
            replace(start, f" {string_token(letters, mark)}")
        replace(f"(?<=[{short}{long}].){inside}*{closing}", " ")
        replace(f"(?<={short})[^a-z0-9]", OTHER)
        replace(f"(?<={long})[{codes.FIRST_HALF.lower()}]", HALF_NAMES[0])
        replace(f"(?<={long})[^{HALF_NAMES[0]}]", HALF_NAMES[1])
        replace(f"[{short}{long}]", "")
    return normalizers.Sequence(steps)


def _corpus() -> list[str]:
    rng = Random("tokenizer")
    texts = []
    for _ in range(12000):
        poster = prompts.random_poster(rng)
        texts.append(prompts.describe(poster, rng))
        if rng.random() < 0.4:
            texts.append(prompts.random_edit(rng).instruction)
    texts += [free_prompts.random_prompt(rng)[0] for _ in range(12000)]
    words = [*phrases.COLOUR_WORDS, *phrases.SHAPE_WORDS, *phrases.SMALL, *phrases.LARGE, *phrases.SHADES]
    texts += [" ".join([*words, *map(str, range(1, 65))])] * 100
    return [slips.QUOTED.sub(" ", text.lower()) for text in texts]


def in_bytes(text: str) -> str:
    """Return a word as the vocabulary writes it."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of codes, words and quoted strings."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(r"⟨\d+⟩.|[a-z0-9]+|[^\s]"), behavior="removed", invert=True)
    split = pre_tokenizers.Sequence([words, byte_level])
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED_WORDS, min_frequency=20, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(_corpus(), trainer)
    learned = learner.get_vocab(with_added_tokens=False)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]

    names = [f"<|dit_token_{i}|>" for i in range(codes.CODEBOOK)] + ["<|dit_token_start|>", "<|dit_token_end|>"]
    names += [f"<|dit_unused_{i}|>" for i in range(codes.CODEBOOK + 2, VISION_VOCABULARY)]
    names += sorted(learned, key=learned.__getitem__) + [in_bytes(token) for token in strings()]
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
