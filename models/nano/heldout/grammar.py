"""The second grammar: whole requests with gaps, unlike the first, which joins clauses.

`{top}`, `{second}`, `{mid}` and `{foot}` are texts in quotation marks, `{bg}` a background, `{one}` a shape with an
article, `{bare}` one without, `{l}` and `{r}` the shapes of a pair, `{twins}` two alike. What a request does not name
is open.
"""

import string
from collections.abc import Sequence
from random import Random

from models.nano.recipe import codes
from models.nano.recipe.facts import COLOUR_FACTS, Fact, Facts
from models.nano.recipe.world import Line, Poster, Shape, Side, Zone

# Requests by the side of their shape: c, l, r; o is open; - has none or a pair.
REQUESTS = r"""
c|Make me a cheerful {bg} poster that says {top} at the top and {foot} at the bottom, with {one} in the middle
c|Could you knock up something {bg} with {top} above and {foot} below? {one} goes in the centre.
c|We are putting up a {bg} notice. It reads {top} on top, has {one} in the middle and ends with {foot} at the bottom.
c|{bg} background please. Up top {top}. In the middle {one}. Down at the bottom {foot}.
c|Our club wants a poster: {bg}, {top} as title, {one} centred, {foot} as footer
c|TOP: {top} / MIDDLE: {bare} / BOTTOM: {foot} / BACKGROUND: {bg}
c|1. background {bg} 2. headline {top} 3. {one} in the center 4. footer {foot}
c|Headline {top}, footer {foot}, {bare} in the centre, {bg} background. Thank you so much!
c|A poster where {one} sits in the middle of {bg}, and over it stands {top}
c|{one} in the middle, {top} above it, {foot} below it, background {bg}
c|In the center I need {one}; underneath it the word {foot}; all of it on {bg}
c|title {top}\nhero: {bare}\nbottom line {foot}\nbackground {bg}
c|- {bg} backdrop\n- {top} at the top\n- {one} in the middle\n- {foot} at the bottom
c|I'd love a print for the hallway, {bg}, with {one} right in the middle and the word {foot} at the bottom
c|Put {top} across the top, then {one} in the center, then {foot} across the bottom. Colour of the background: {bg}
c|Top headline: {top}. Center hero image: {bare}. Bottom footer bar: {foot}. Background: {bg}.
c|top headline {top}, center hero image {one}, bottom footer {foot}
c|Hiya! Flyer in {bg}. {top} at the top, please, {one} in the middle. Cheers
c|the poster is {bg} and in its center is {one}. above that, the text {top}
c|{bg} poster, {bare} in the middle, no text
c|Under the headline {top} there should be {one} in the middle of the page, then {foot} at the bottom
c|Draw {one} in the middle of a {bg} sheet. Write {top} over it.
l|On the left {one}, at the top {top}, at the bottom {foot}, everything on {bg}
l|Give the {bg} card a title, {top}, and {one} on the left
l|a {bg} sign with {one} on the left-hand side and {foot} along the bottom
l|Left: {bare}. Top: {top}. Background: {bg}.
l|Headline: {top}; left side: {bare}; footer: {foot}
r|{top} at the top of a {bg} poster, {one} to the right
r|I want {one} on the right side of the picture and the heading {top}. Make it {bg}.
r|Background {bg}, right: {bare}, bottom: {foot}
r|My shop needs a {bg} sign. The title says {top}. On the right there is {one}. The footer says {foot}.
o|a {bg} poster saying {top} with {one}
o|{top} poster with {one}, {bg} background
o|poster for the summer fair with {one} and the words {top} at the top
o|I need a sign that reads {top}. It should have {one} on it and be {bg}.
o|Please create an ad: {bg}, {bare}, headline {top}, bottom line {foot}
o|{one} and {top}
o|headline {top} on top, {foot} below, plus {one}
o|just {one} on {bg}, nothing else
o|simple poster: {bare}
o|Can you do a flyer with {top} as the headline, {foot} as the footer and {one}?
o|for our yearly party: title {top}, {one}, {bg}
o|Design a card. Use {bg} for the background. Add {one}. Write {top} on it.
-|headline {top} on top, {foot} below
-|{bg} poster, {top} at the top, {foot} at the bottom
-|Poster, {bg}. It says {top}.
-|Nothing but the word {top} on {bg}
-|write {top}
-|A {bg} background with {top} at the very top and {foot} at the very bottom. No pictures.
-|Could I have {top} and, at the bottom, {foot}? Make the background {bg}, please.
-|{foot} at the bottom of a {bg} poster
-|At the bottom it says {foot}, at the top it says {top}.
-|footer {foot}, header {top}, backdrop {bg}
-|the header reads {top} while the footer reads {foot}; background in {bg}
-|three lines on {bg}: {top}, {mid}, {foot}
-|{top} at the top, {mid} in the middle, {foot} at the bottom, {bg} background
-|Top: {top}\nMiddle: {mid}\nBottom: {foot}\nBackground: {bg}
-|I'd like {mid} in the center of a {bg} poster
-|Our {bg} placard says {mid} in the middle and {foot} at the bottom
c|Headline {top}, subtitle {second}, {small} in the middle, footer {foot}, background {bg}
o|title: {top}; subheading: {second}; {small}; {bg} background
-|{bg} flyer with the headline {top} and the tagline {second}
-|heading {top}, directly under the headline {second}, at the bottom {foot}
-|{bg} poster with {l} on the left and {r} on the right, headline {top}
-|{l} and {r} on {bg}, title {top}, footer {foot}
-|Two shapes side by side: {l} and {r}. Above: {top}. Background: {bg}.
-|On the left {l}. On the right {r}. The headline is {top}.
-|Left: {lbare}. Right: {rbare}. Footer: {foot}. Background: {bg}.
-|I would like {l} next to {r}, and at the top it should say {top}
-|a {bg} background, {l} beside {r}
-|{twins} on a {bg} poster with the title {top}
-|Show {twins}, with {foot} at the bottom
-|{top} up top, {l} to the left, {r} to the right, {foot} down the bottom, {bg} behind it all
-|Make the background {bg}. Put {l} on the left. Put {r} on the right. Put {foot} at the bottom.
c|{bg} poster saying happy birthday with {one} in the middle
-|a poster that says welcome to our house, {bg} background
o|sign with the title good morning and {one}
c|Please, a {bg} one. {top} at the top! And {one}, in the center, if you don't mind.
c|i need a poster 4 my band its {bg} {top} at top n {foot} at bottom n {one} in the middle
c|I won't need much: {top} at the top, {one} in the middle. It's for a {bg} wall, so make the background {bg}
-|put the text {top} on the top and the text {foot} on the bottom of a {bg} picture
c|Let the headline be {top}. Let the center show {one}. Let the footer be {foot}. Let the background be {bg}.
r|Lay it out like this: headline {top}, {bare} on the right, and footer {foot}
""".strip().splitlines()

TEXTS = """LEMONS|FRESH|BALLET|YARD SALE|BAKE SALE|OPEN LATE|QUIET|BOO!|VOTE|KARAOKE|BINGO|QUIZ NIGHT|BOOKS|ICE CREAM|
TACOS|RAMEN|SUSHI|BAGELS|HONEY|EGGS|APPLES|PUMPKINS|FLOWERS|KITTENS|LOST DOG|GYM|CHESS|DRUMS|OPERA|CIRCUS|ZOO|AQUARIUM|
50 OFF|2 FOR 1|ROOM 8|EXIT|PUSH|PULL|NO ENTRY|WET PAINT|TOILETS|PARKING|BIKES|BUS 42|Q AND A|BBQ|DJ KIM|LUCY|OSCAR|
MAYA IS 7|JAZZ CLUB|ROBOTS|COMICS|VINYL|POTTERY|KNITTING|SAMBA|TANGO|HIKE|SURF|SKI WEEK|SNOW DAY|RAINBOW|DOUGHNUTS|
SUMMER SALE|GRAND OPENING|LEMONADE|FARM MARKET|OPEN MIC NIGHT|HAPPY BIRTHDAY|GARAGE SALE|BOOK CLUB|GAME NIGHT|
FIRE DRILL|MEET AT NOON|COFFEE BREAK|POOL CLOSED|SCHOOL PLAY|FREE HUGS|TEAM BLUE|THE END|THANK YOU|SEE YOU THERE|
JUNE 21|8PM|AT 7|SUNDAY|TONIGHT|ONLY HERE|COME IN|ASK INSIDE|EST. 1987|ALL AGES|BE KIND|STAY COOL|OH BOY""".replace(
    "\n", ""
).split("|")
BARS = ("on a {} bar", "on a {} banner", "over a {} stripe", "on a {} strip")
HUES = {
    "scarlet": "red", "crimson": "red", "golden": "yellow", "lemon": "yellow", "emerald": "green", "turquoise": "teal",
    "navy": "blue", "violet": "purple", "bright red": "red", "dark green": "green", "light blue": "blue",
}  # fmt: skip
FORMS = {"disc": "circle", "plus": "cross", "donut": "ring", "box": "square"}
BIG, LITTLE = ("big", "large", "huge", "giant"), ("small", "tiny", "little")
MARKS = ('""', '""', '""', '""', "“”", "“”", "''", "「」")
SIDES: dict[str, Side] = {"c": "center", "l": "left", "r": "right", "o": "center", "-": "center"}
ZONE_OF: dict[str, Zone] = {"top": "headline", "second": "subtitle", "mid": "middle", "foot": "footer"}


def random_case(rng: Random) -> tuple[str, Facts]:
    """Return a request and its facts."""
    side, request = rng.choice(REQUESTS).split("|", 1)
    gaps = {name for _, name, _, _ in string.Formatter().parse(request) if name}
    open_facts: set[Fact] = set() if "bg" in gaps else {"background"}
    if side == "o":
        open_facts.add("side")
    palette = list(range(len(codes.COLOURS)))
    rng.shuffle(palette)
    background, others = palette[0], palette[1:]
    texts = rng.sample(TEXTS, 4)
    marks = rng.choice([pair for pair in MARKS if "'" not in request or pair != "''"])
    lines: dict[Zone, Line] = {}
    values = {"bg": _word(background, codes.COLOURS, HUES, rng)}
    for gap, text in zip(ZONE_OF, texts, strict=True):
        if gap in gaps:
            bar = rng.choice(others) if rng.random() < 0.12 else None
            lines[ZONE_OF[gap]] = Line(text, bar)
            values[gap] = _quoted(text, bar, marks, rng)
    shapes, names = _shapes(gaps, SIDES[side], others, open_facts, rng)
    text = request.replace("\\n", "\n").format(**values, **names)
    if rng.random() < 0.06:
        text = _slip(text, rng)
    if rng.random() < 0.2:
        text = text.lower() if rng.random() < 0.5 else text[0].lower() + text[1:]
    return text, Facts(Poster(background, shapes=shapes).with_lines(lines), frozenset(open_facts))


def _shapes(
    gaps: set[str], side: Side, colours: Sequence[int], open_facts: set[Fact], rng: Random
) -> tuple[tuple[Shape, ...], dict[str, str]]:
    """Return the shapes of a request and the phrases for its gaps; adds what these leave open."""
    pair = bool(gaps & {"l", "lbare", "twins"})
    if not pair and not gaps & {"one", "bare", "small"}:
        return (), {}
    large, says_size = rng.random() < 0.5, rng.random() < 0.5
    if "small" in gaps:
        large, says_size = False, True
    if not says_size:
        open_facts.add("size")
    kinds = rng.sample(range(len(codes.SHAPES)), 2)
    kinds = [kinds[0], kinds[0]] if "twins" in gaps else kinds
    picked = [colours[0], colours[0] if "twins" in gaps else colours[1]]
    sides: tuple[Side, ...] = ("left", "right") if pair else (side,)
    says_colour = [rng.random() < 0.85 for _ in sides]
    if "twins" in gaps:
        says_colour = says_colour[:1] * 2
    open_facts |= {fact for fact, said in zip(COLOUR_FACTS, says_colour, strict=False) if not said}
    shapes = tuple(Shape(k, c, large, at) for k, c, at in zip(kinds, picked, sides, strict=False))
    size = rng.choice(BIG if large else LITTLE) if says_size else ""
    bare = [
        _noun(shape, size, said, rng, plural="twins" in gaps) for shape, said in zip(shapes, says_colour, strict=True)
    ]
    names = {"bare": bare[0], "lbare": bare[0], "rbare": bare[-1], "twins": f"two {bare[0]}"}
    names |= {gap: _article(bare[i]) for gap, i in (("one", 0), ("small", 0), ("l", 0), ("r", -1))}
    return shapes, names


def _noun(shape: Shape, size: str, says_colour: bool, rng: Random, plural: bool) -> str:
    kind = codes.SHAPES[shape.kind]
    kind = f"{kind}{'es' if kind.endswith('s') else 's'}" if plural else _word(shape.kind, codes.SHAPES, FORMS, rng)
    if not says_colour:
        return f"{size} {kind}".strip()
    colour = _word(shape.colour, codes.COLOURS, HUES, rng)
    if rng.random() < 0.2:
        return f"{size} {kind} in {colour}".strip()
    return " ".join(word for word in (size, colour, kind) if word)


def _word(index: int, names: Sequence[str], others: dict[str, str], rng: Random) -> str:
    matching = [word for word, means in others.items() if means == names[index]]
    return rng.choice(matching) if matching and rng.random() < 0.1 else names[index]


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _quoted(text: str, bar: int | None, marks: str, rng: Random) -> str:
    shown = text.capitalize() if rng.random() < 0.15 else text.lower() if rng.random() < 0.15 else text
    quoted = marks[0] + shown + marks[-1]
    return quoted if bar is None else f"{quoted} {rng.choice(BARS).format(codes.COLOURS[bar])}"


def _slip(text: str, rng: Random) -> str:
    """Swap, drop or double a letter of one long word outside of quotation marks."""
    depth, starts = False, []
    for i, letter in enumerate(text):
        depth ^= letter in "\"“”「」'"
        if not depth and text[i : i + 5].isalpha() and text[i : i + 5].islower():
            starts.append(i)
    if not starts:
        return text
    i = rng.choice(starts) + 1
    return rng.choice((
        text[:i] + text[i + 1] + text[i] + text[i + 2 :], text[:i] + text[i + 1 :], text[:i] + text[i] + text[i:],
    ))  # fmt: skip


def cases(count: int = 300) -> list[tuple[str, Facts]]:
    """Return the fixed prompts and their facts."""
    rng = Random("second grammar")
    return [random_case(rng) for _ in range(count)]
