"""Tables of the free prompts: what a newcomer may write.

In templates {q} is a quoted text (with its bar), {p} a place, {n} a zone's name, {w} "word", {s} "says", {x} a shape,
{c} a colour, {b} a kind of sheet.
"""

from models.nano.recipe.prompts import OTHER_COLOUR_WORDS, OTHER_SHAPE_WORDS
from models.nano.recipe.world import Zone

MORE_COLOUR_WORDS = {
    "ruby": "red", "cherry": "red", "tangerine": "orange", "amber": "orange", "gold": "yellow", "mustard": "yellow",
    "lime": "green", "mint": "green", "cyan": "teal", "aqua": "teal", "azure": "blue", "cobalt": "blue",
    "indigo": "blue", "lavender": "purple", "plum": "purple", "lilac": "purple", "fuchsia": "pink", "cream": "white",
    "charcoal": "black", "ebony": "black",
}  # fmt: skip
MORE_SHAPE_WORDS = {
    "dot": "circle", "ball": "circle", "block": "square", "lozenge": "diamond", "hoop": "ring", "doughnut": "ring",
    "hearts": "heart", "stars": "star", "circles": "circle", "squares": "square", "triangles": "triangle",
    "diamonds": "diamond", "crosses": "cross", "rings": "ring",
}  # fmt: skip
COLOUR_WORDS = OTHER_COLOUR_WORDS | MORE_COLOUR_WORDS
SHAPE_WORDS = OTHER_SHAPE_WORDS | MORE_SHAPE_WORDS
SHADES = ("bright", "dark", "light", "pale", "deep", "vivid", "soft", "strong")
LARGE = ("large", "big", "huge", "giant", "enormous", "massive", "oversized")
SMALL = ("small", "little", "tiny", "mini")
SHEETS = ("poster", "poster", "poster", "poster", "sign", "flyer", "card", "picture", "image", "design", "print")
STYLE_WORDS = (
    "simple", "flat", "bold", "clean", "minimal", "modern", "retro", "plain", "nice", "beautiful", "cool", "fun",
    "elegant", "cute", "friendly", "minimalist", "playful", "stylish", "vintage", "catchy",
)  # fmt: skip

ZONE_NAMES: dict[Zone, tuple[str, ...]] = {
    "headline": ("headline", "headline", "title", "header", "heading", "top headline", "top text", "main title",
                 "top line", "head line", "upper text", "first line"),
    "subtitle": ("subtitle", "subheading", "subheadline", "sub-headline", "tagline", "sub title"),
    "middle": ("center text", "middle text", "middle line", "center line", "text in the middle"),
    "footer": ("footer", "footer", "bottom footer", "bottom text", "bottom line", "footer bar", "bottom footer bar",
               "foot line", "lower text", "caption", "last line", "footer text"),
}  # fmt: skip
ZONE_PLACES: dict[Zone, tuple[str, ...]] = {
    "headline": ("at the top", "at the top", "on top", "on the top", "at the very top", "in the top", "up top",
                 "along the top", "across the top", "in the upper part", "at the head", "top", "at top"),
    "subtitle": ("right below the headline", "just under the title", "directly under the headline",
                 "right under the title", "directly below the title", "just below the headline"),
    "middle": ("in the middle", "in the center", "at the center", "in the very middle", "in the center of the poster",
               "across the middle", "center"),
    "footer": ("at the bottom", "at the bottom", "on the bottom", "at the very bottom", "in the bottom", "down below",
               "along the bottom", "across the bottom", "in the lower part", "at the foot", "bottom", "at bottom"),
}  # fmt: skip
BELOW = ("below it", "below that", "underneath", "underneath it", "beneath it", "under it", "under that", "below",
         "further down", "beneath")  # fmt: skip
ABOVE = ("above it", "above that", "above", "over it", "on top of that", "over that", "higher up")
BELOW_SHAPE = ("below the {k}", "under the {k}", "underneath the {k}", "beneath the {k}")
ABOVE_SHAPE = ("above the {k}", "over the {k}", "on top of the {k}")
WORD_NOUNS = ("word", "words", "text", "text", "lettering", "letters", "phrase", "message")
SAYS = ("says", "reads", "saying", "reading", "which says", "that says", "that reads", "with the words",
        "with the text", "with the word")  # fmt: skip

# Phrases of a line, with and without a place; whole sentences.
LINE_PHRASES = (
    "{n} {q}", "{n} {q}", "{n}: {q}", "the {n} {q}", "{q} {p}", "{q} {p}", "{q} {p}", "{q} as the {n}", "{p} {q}",
    "{p}: {q}", "{p} the {w} {q}", "the {w} {q} {p}", "{w} {q} {p}", "a {n} that {says} {q}", "a {n} saying {q}",
    "the {n} {says} {q}", "{q} written {p}", "{n} = {q}", "{q} for the {n}", "{w} {p}: {q}", "{p} it {says} {q}",
    "{q} in the {n}", "{p}, {q}", "{says} {q} {p}", "saying {q} {p}", "reading {q} {p}", "{n} - {q}", "{n} ({q})",
    "{q} ({p})", "{q} placed {p}", "a {n} with {q}", "{p} we have {q}", "{n} text {q}", "{q} in bold {p}",
    "a {n} {q}", "the {w} {q} as {n}",
)  # fmt: skip
LINE_SENTENCES = (
    "{p} it {says} {q}", "the {n} {says} {q}", "{p} write {q}", "write {q} {p}", "put {q} {p}", "put the {w} {q} {p}",
    "add {q} {p}", "i want {q} {p}", "{q} should be {p}", "the {n} should say {q}", "the {n} should read {q}",
    "use {q} as the {n}", "{p} i want {q}", "{p} please write {q}", "there is {q} {p}", "it should say {q} {p}",
    "{q} goes {p}", "{q} is {p}", "the {n} is {q}", "make the {n} {q}", "let the {n} say {q}", "have {q} {p}",
    "print {q} {p}", "{p} is the {w} {q}", "the {w} {q} should appear {p}", "place {q} {p}", "{p} we read {q}",
    "it says {q} {p}", "as the {n}, use {q}", "for the {n} write {q}", "{p} comes {q}", "{p} you can read {q}",
)  # fmt: skip
LINE_FIELDS = ("{n}: {q}", "{n}: {q}", "{p}: {q}", "{n} = {q}", "{n} {q}", "{n} - {q}", "{p} {q}", "{p} - {q}",
               "{n} text: {q}", "{n} → {q}", "{p}: {w} {q}")  # fmt: skip
UNPLACED = ("{says} {q}", "saying {q}", "reading {q}", "with {q} on it", "with the {w} {q}", "the {w} {q}", "{w} {q}",
            "{w}: {q}", "titled {q}", "with {q} written on it", "it {says} {q}", "{q}", "{q}")  # fmt: skip
UNPLACED_SENTENCES = ("it should say {q}", "write {q}", "it {says} {q}", "the {w} should be {q}", "the {w} is {q}",
                      "put {q} on it", "it reads {q}", "add the {w} {q}", "i want it to say {q}")  # fmt: skip
BARS = ("on {c} bar", "on {c} bar", "over {c} bar", "in front of {c} bar", "with {c} bar", "on {c} band",
        "on {c} strip", "on {c} banner", "on {c} stripe", "on {c} ribbon", "with {c} bar behind it",
        "over {c} stripe", "inside {c} bar")  # fmt: skip

SHAPE_PLACES = {
    "center": ("in the middle", "in the middle", "in the center", "in the center", "at the center", "as the hero",
               "centered", "in the very middle", "between the lines", "in between", "as the main image", "dead center"),
    "left": ("on the left", "on the left", "at the left", "to the left", "on the left side", "on the left-hand side",
             "left", "over on the left"),
    "right": ("on the right", "on the right", "at the right", "to the right", "on the right side",
              "on the right-hand side", "right", "over on the right"),
}  # fmt: skip
SHAPE_NAMES = {
    "center": ("center hero", "center hero image", "hero image", "hero", "center image", "middle", "center",
               "main image", "central image", "in the middle", "centre piece"),
    "left": ("left", "left side", "on the left", "left image"),
    "right": ("right", "right side", "on the right", "right image"),
}  # fmt: skip
SHAPE_PHRASES = ("{x} {p}", "{x} {p}", "{x} {p}", "{p} {x}", "{p}: {x}", "{n} {x}", "{n}: {x}", "{p} there is {x}",
                 "{x} placed {p}", "{p}, {x}", "{x} sitting {p}")  # fmt: skip
SHAPE_SENTENCES = (
    "{p} there is {x}", "there is {x} {p}", "{p} draw {x}", "draw {x} {p}", "put {x} {p}", "add {x} {p}",
    "i want {x} {p}", "{p} i would like {x}", "{x} should be {p}", "{x} goes {p}", "place {x} {p}", "{p} we see {x}",
    "{x} sits {p}", "the {n} is {x}", "show {x} {p}", "{p} should be {x}",
)  # fmt: skip
SHAPE_FIELDS = ("{n}: {x}", "{n}: {x}", "{n} - {x}", "{x} {p}", "{p}: {x}", "{n} {x}", "{n} = {x}")
UNPLACED_SHAPES = ("{x}", "{x}", "with {x}", "featuring {x}", "plus {x}", "including {x}")
UNPLACED_SHAPE_FIELDS = ("{x}", "shape: {x}", "symbol: {x}", "icon: {x}", "image: {x}", "graphic: {x}")
UNPLACED_SHAPE_SENTENCES = ("add {x}", "draw {x}", "there is {x}", "include {x}", "show {x}", "i want {x} on it",
                            "it has {x}", "it should have {x}")  # fmt: skip
BELOW_HEADLINE = ("below it {x}", "underneath {x}", "under that {x}", "then {x} below", "beneath it {x}")
PAIRS = (
    "{x} and {y}", "{x} and {y}", "{x} next to {y}", "{x} beside {y}", "{x} and {y} side by side",
    "{x} on the left and {y} on the right", "{y} on the right and {x} on the left", "on the left {x}, on the right {y}",
    "{x} on the left, {y} on the right", "left {x}, right {y}", "{x} (left) and {y} (right)", "{x} and next to it {y}",
    "{x} with {y} to its right", "{y} with {x} to its left", "{x} to the left of {y}", "{y} to the right of {x}",
    "{x} and to the right of it {y}", "{x}, and {y} beside it", "{x} left and {y} right", "both {x} and {y}",
)  # fmt: skip
TWINS = ("two {xs}", "two {xs}", "a pair of {xs}", "2 {xs}", "two {xs} side by side", "two identical {xs}",
         "two {xs}, one on the left and one on the right")  # fmt: skip

# Openings with a background, and without.
OPENINGS = (
    "{a} {b}", "{a} {b}", "{b} with {a} background", "{b} on {a} background", "{b} on {c}", "{b} in {c}",
    "{b}, {c} background", "{b} with {a} backdrop", "{a} {y} {b}", "{y} {b} with {a} background", "{y} {b} in {c}",
    "{b} against {a} backdrop", "{b}: {c}", "{b} that is {c}", "{b} whose background is {c}", "{b} all in {c}",
    "{b} (background {c})", "{b}, background {c}", "{a} background {b}", "{b} on plain {c}", "{b} colored {c}",
    "{b} with the background in {c}", "{b} with {c} as the background color", "{c} {b}",
)  # fmt: skip
BACKGROUND_PHRASES = (
    "on {a} background", "on {c}", "{c} background", "background {c}", "background: {c}", "against {a} backdrop",
    "on {a} backdrop", "the background is {c}", "all on {c}", "everything on {a} background", "with {a} background",
    "set on {c}", "background in {c}", "background color {c}", "over {a} background", "on a plain {c} background",
)  # fmt: skip
BACKGROUND_SENTENCES = (
    "the background is {c}", "make the background {c}", "the background should be {c}", "use {a} background",
    "use {c} for the background", "use {c} as the background", "background: {c}", "i want {a} background",
    "the {b} is {c}", "the background color is {c}", "it should be on {a} background", "give it {a} background",
    "color the background {c}", "the whole {b} is {c}", "put it all on {c}", "paint the background {c}",
)  # fmt: skip
BACKGROUND_FIELDS = ("background: {c}", "background: {c}", "{c}", "{c} background", "background color: {c}",
                     "backdrop: {c}", "background = {c}", "background - {c}", "color: {c}", "bg: {c}")  # fmt: skip
LEADS = (
    "make", "make me", "create", "draw", "design", "generate", "i want", "i need", "i would like", "i'd like",
    "can you make", "could you make", "please make", "please create", "can you please design", "give me", "show me",
    "we need", "let's make", "paint", "produce", "build me", "could you draw", "we would like", "can i have",
    "could i get", "please draw me", "do", "help me make", "i'm looking for", "need",
)  # fmt: skip
JOINS = (" with ", ", ", ": ", ", with ", ". ", " - ", " that has ", " showing ", "; ", " — ", " featuring ", " and ")
GREETINGS = ("hi!", "hi,", "hello,", "hey,", "hello!", "hey there,", "good morning,", "ok,", "so,", "dear painter,")
PURPOSES = (
    "for my {t}", "for our {t}", "for the {t}", "for a {t}", "for my {t} {t}", "about {t}", "for the {t} {t}",
    "for my daughter's {t}", "for a friend's {t}", "to hang at the {t}",
)  # fmt: skip
TOPICS = """shop party school birthday wedding bakery office kitchen cafe bar club garden market fair festival concert
band show game team gym library museum lemonade stand sale yard garage street town church class lesson recital theater
film night evening weekend dance yoga soccer football tennis swim run dog cat pet farm fruit bread cake coffee tea pizza
soup book reading poetry art craft music jazz rock choir opera summer winter spring autumn holiday camp trip travel
beach lake river mountain hotel restaurant bike car bus train plane science tech robot computer startup company product
launch meeting workshop seminar charity fundraiser election campaign club house home room door window wall fridge
neighborhood community village city friends family kids children parents grandma teacher doctor dentist""".split()  # noqa: SIM905
ENDINGS = (
    "please", "thanks", "thank you", "thanks!", "thanks a lot", "high contrast", "clean layout", "sharp lettering",
    "flat design", "minimal design", "high quality", "modern style", "with lots of space", "vector art",
    "nothing else", "no other text", "keep it simple", "and nothing else", "very simple", "make it pop",
    "don't add anything else", "no extra words", "it's for {t}", "make it look good", "in a flat style", "no photo",
    "that's all", "that is all", "i hope you can do that", "big letters", "bold letters", "with a clear font",
    "nice and clean", "easy to read", "no gradients", "professional looking", "4k", "hd", "for print",
    "don't overdo it", "we're in a hurry", "ready to print", "in portrait format",
)  # fmt: skip
UNQUOTED = (
    "saying {u}", "that says {u}", "with the words {u}", "with the title {u}", "about {u}", "called {u}",
    "with the text {u}", "that reads {u}", "titled {u}", "the headline should say {u}", "write {u} on it",
    "headline {u}", "it should say {u}", "the title is {u}", "with {u} at the top", "with {u} at the bottom",
)  # fmt: skip
UNQUOTED_WORDS = """hello welcome sale open closed happy birthday good morning summer winter party congratulations
thanks love peace music live tonight free coffee fresh lemons bread pizza jazz night market grand opening big news now
hiring save the date join us today only best wishes merry christmas new year see you soon come in keep calm""".split()  # noqa: SIM905
